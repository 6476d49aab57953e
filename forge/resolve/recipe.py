"""A recipe with everything that it names, found: the base at its commit, the adapter, the data files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from forge.adapter.read import read_adapter
from forge.errors import DataError
from forge.model.base import ResolvedBase, resolve
from forge.model.safetensors_header import TensorSpec
from forge.recipe.load import Loaded
from forge.recipe.schema import Adopted, Train
from forge.resolve.bases import find_base, find_base_headers
from forge.resolve.refusals import check_base
from forge.resolve.resolved import Resolved
from forge.resolve.sources import data_sources
from forge.runs.manifest import Pins
from forge.store.artifacts import Store


def resolve_recipe(
    loaded: Loaded,
    store: Store,
    run_directory: Path,
    *,
    pins: Pins | None = None,
    offline: bool = False,
    fetch: Literal["all", "headers", "nothing"] = "all",
) -> Resolved:
    """Find everything that the recipe names, and refuse what cannot work, before anything runs.

    `pins` are those of the run's last ship: a hub name without revision stays at its commit. With
    `fetch` other than all the hub is asked for headers only, or not at all; good for a plan.
    Raises `DataError` for a base that cannot be trained or exported, or is not whole.
    """
    recipe = loaded.recipe
    pins = pins or Pins()
    base, headers = _base(loaded, store, pins, offline=offline, fetch=fetch)
    adopted = None
    if isinstance(recipe.train, Adopted):
        source = recipe.train.source
        revision = recipe.train.revision or (pins.adapter_revision if pins.adapter == source else None)
        adopted = resolve(
            source, revision=revision, offline=offline, fetch=fetch == "all", relative_to=loaded.directory
        )
    if adopted and adopted.directory:
        read_adapter(adopted.directory)  # what it cannot be is refused though the base may not be here yet
    if isinstance(recipe.train, Train) and recipe.train.continue_from:
        _refuse_continued(loaded.directory / Path(recipe.train.continue_from).expanduser())
    sources, heldout = data_sources(loaded, offline=offline, fetch=fetch == "all", pinned=pins.data)
    ship = Resolved(loaded, store, run_directory, base, adopted, sources, heldout, headers)
    if base.directory is not None:
        check_base(ship)
    return ship


def _refuse_continued(directory: Path) -> None:
    """Refuse what training cannot go on from; other tools' adapters are taken as they are."""
    if not directory.is_dir():
        raise DataError(
            f"train.continue_from: {directory} is not a directory",
            hint="name an adapter's directory, such as runs/NAME/adapter; one of the hub is downloaded first",
        )
    read_adapter(directory)


def _base(
    loaded: Loaded, store: Store, pins: Pins, *, offline: bool, fetch: str
) -> tuple[ResolvedBase, Mapping[str, TensorSpec] | None]:
    spec = loaded.recipe.base.id
    revision = loaded.recipe.base.revision or (pins.base_revision if pins.base == spec else None)
    if fetch != "headers":
        whole = fetch == "all"
        base = find_base(
            spec, revision=revision, offline=offline, fetch=whole, relative_to=loaded.directory, store=store
        )
        return base, None
    return find_base_headers(
        spec, revision=revision, offline=offline, relative_to=loaded.directory, store=store
    )
