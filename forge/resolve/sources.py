"""Which data files a recipe's `data` section names: local, built in, or of a hub dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forge.data.files import is_data_file
from forge.data.layout import AUTO, Shape
from forge.data.reading import Source, reader_named
from forge.data.sources import files_of_split, locate, locate_all
from forge.errors import DataError
from forge.model.base import fetch_dataset, local_directory
from forge.recipe.checks import local_path
from forge.recipe.load import Loaded
from forge.recipe.schema import Data, DataSource, Train

_BEFORE_IT_IS_HERE = 0.1


def data_sources(
    loaded: Loaded, *, offline: bool, fetch: bool, pinned: Mapping[str, str] | None = None
) -> tuple[tuple[Source, ...], float | int | Path]:
    """The sources of the rows, and what is held out: a share, a number of rows, or a file.

    A hub dataset that may not be fetched has no files; one without a revision is taken at its commit in
    `pinned`. Raises `DataError` for a file that is not there, and what `model.base.fetch_dataset` raises.
    """
    data = loaded.recipe.data
    if data is None:
        return (), 0
    train = loaded.recipe.train
    objective = train.objective if isinstance(train, Train) else "sft"
    sources = tuple(
        _source(
            data, source, loaded.directory, pinned or {}, offline=offline, fetch=fetch, objective=objective
        )
        for source in data.sources
    )
    if not isinstance(data.eval, str):
        return sources, data.eval
    if not _is_split(data.eval, loaded.directory):
        return sources, locate(data.eval, loaded.directory, "data.eval")
    folder = _folder(data.sources[0], loaded.directory, pinned or {}, offline=offline, fetch=fetch)
    return sources, _file_of_split(data, folder, is_here=bool(sources[0].files))


def _is_split(named: str, directory: Path) -> bool:
    """Whether `data.eval` can only be a split of the rows' own set, as no file is called so."""
    return not named.startswith("builtin:") and local_path(named, directory) is None


def _file_of_split(data: Data, folder: Path | None, *, is_here: bool) -> float | Path:
    """The file of held-out rows; before the set is fetched a share stands for it."""
    split = str(data.eval)
    if folder is None and not is_here:
        return _BEFORE_IT_IS_HERE
    if folder is None or len(data.sources) > 1:
        raise DataError(f"data.eval: there is no file {split}", hint="name a file, or a split of a directory")
    files = files_of_split(folder, split)
    if "[" in split or len(files) > 1:
        raise DataError(
            f"data.eval: {split} is a slice or {len(files)} files, and one file is needed here",
            hint=f"name one of the files, such as {files[0]}",
        )
    return files[0]


def _source(
    data: Data,
    source: DataSource,
    directory: Path,
    pinned: Mapping[str, str],
    *,
    offline: bool,
    fetch: bool,
    objective: str,
) -> Source:
    split, form, columns = (
        source.split or data.split,
        source.format or data.format,
        source.columns or data.columns,
    )
    folder = None
    if _is_hub_id(source.source, directory):
        folder = _folder(source, directory, pinned, offline=offline, fetch=fetch)
        files = files_of_split(folder, split) if folder else ()
    elif source.revision:
        raise DataError(
            f"data.revision: {source.source} has none, only a data set of the hub does",
            hint="leave it out, or name the hub id in data.source",
        )
    else:
        files = locate_all(source.source, directory, split)
    own = ":" in form
    shape = Shape(
        AUTO if own else form,
        columns.model_dump(exclude_none=True),
        data.roles,
        data.ignore,
        reader_named(form, directory) if own else None,
        pairs=objective != "sft",
        labels=objective == "kto",
    )
    return Source(files, shape, split, source.weight, data.encoding, folder.name if folder else None)


def _folder(
    source: DataSource, directory: Path, pinned: Mapping[str, str], *, offline: bool, fetch: bool
) -> Path | None:
    """A set's directory; None for a file, and for a set of the hub that may not be fetched."""
    if not _is_hub_id(source.source, directory):
        path = directory / Path(source.source).expanduser()
        return path.resolve() if path.is_dir() else None
    revision = source.revision or pinned.get(source.source)
    return fetch_dataset(source.source, revision=revision, offline=offline) if fetch else None


def _is_hub_id(source: str, directory: Path) -> bool:
    if source.startswith("builtin:") or (directory / Path(source).expanduser()).exists():
        return False
    looks_like_a_file = is_data_file(source) or any(letter in source for letter in "*?[")
    return source.count("/") == 1 and not looks_like_a_file and local_directory(source, directory) is None
