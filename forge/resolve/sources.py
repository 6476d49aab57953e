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
from forge.recipe.load import Loaded
from forge.recipe.schema import Data, DataSource, Train


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
    heldout = locate(data.eval, loaded.directory, "data.eval") if isinstance(data.eval, str) else data.eval
    return sources, heldout


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
        revision = source.revision or pinned.get(source.source)
        folder = fetch_dataset(source.source, revision=revision, offline=offline) if fetch else None
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


def _is_hub_id(source: str, directory: Path) -> bool:
    if source.startswith("builtin:") or (directory / Path(source).expanduser()).exists():
        return False
    looks_like_a_file = is_data_file(source) or any(letter in source for letter in "*?[")
    return source.count("/") == 1 and not looks_like_a_file and local_directory(source, directory) is None
