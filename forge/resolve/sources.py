"""Which data files a recipe's `data` section names: local, built in, or of a hub dataset."""

from __future__ import annotations

from pathlib import Path

from forge.data.sources import locate
from forge.errors import DataError
from forge.model.base import fetch_dataset, local_directory
from forge.recipe.load import Loaded


def data_files(loaded: Loaded, *, offline: bool, fetch: bool) -> tuple[tuple[Path, ...], float | int | Path]:
    """The files of the rows, and what is held out: a share, a number of rows, or a file.

    Of a hub dataset that may not be fetched there are no files. Raises `DataError` for a file that is
    not there, and what `model.base.fetch_dataset` raises.
    """
    data = loaded.recipe.data
    if data is None:
        return (), 0
    if _is_hub_id(data.source, loaded.directory):
        if not fetch:
            return (), data.eval if not isinstance(data.eval, str) else 0
        folder = fetch_dataset(data.source, revision=data.revision, offline=offline)
        files = _files_of_split(folder, data.split)
    else:
        files = (locate(data.source, loaded.directory),)
    heldout = locate(data.eval, loaded.directory) if isinstance(data.eval, str) else data.eval
    return files, heldout


def _is_hub_id(source: str, directory: Path) -> bool:
    if source.startswith("builtin:") or (directory / Path(source).expanduser()).exists():
        return False
    looks_like_a_file = Path(source).suffix.lower() in (".jsonl", ".json", ".csv", ".parquet")
    return source.count("/") == 1 and not looks_like_a_file and local_directory(source, directory) is None


def _files_of_split(folder: Path, split: str) -> tuple[Path, ...]:
    """The data files of a hub dataset that belong to `split`, by their name, as the hub does it."""
    name = split.partition("[")[0]
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".jsonl", ".json", ".csv", ".parquet") and not path.name.startswith(".")
    )
    named = [path for path in found if name in path.relative_to(folder).as_posix().lower()]
    chosen = named or (found if len(found) == 1 else [])
    if not chosen:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found) or "none"
        raise DataError(
            f"data.split: no file of the split {name!r} in the hub dataset; its files are: {names}",
            hint="set data.split, or download the file you want and name it as data.source",
        )
    if "[" in split:
        raise DataError(
            f"data.split: {split}: slices are not supported", hint="use data.limit for the first rows"
        )
    return tuple(chosen)
