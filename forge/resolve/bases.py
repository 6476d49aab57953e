"""A base by its name, as `model.base` finds it, and `builtin:smollm2`, which is made into the store.

Making it takes seconds and 270 MB, once, and asks no network: even a plan makes it, which could say little of
a base that it does not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from forge import report, worker
from forge.codec import Json, to_plain
from forge.model import base as bases
from forge.model.base import ResolvedBase
from forge.model.checkpoint import open_checkpoint
from forge.model.safetensors_header import TensorSpec
from forge.model.smollm2 import PACKAGE, VERSION, MakeRequest, make_smollm2, packaged_gguf
from forge.store.artifacts import Artifact, Store, open_store
from forge.store.digest import digest

SMOLLM2 = "builtin:smollm2"
_STAGE = "base"


def find_base(
    spec: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    fetch: bool = True,
    relative_to: Path | None = None,
    store: Store | None = None,
) -> ResolvedBase:
    """As `model.base.resolve`; raises as it, and `MissingToolError` for a base whose package is missing.

    `store` is the user's when it is None.
    """
    if spec == SMOLLM2:
        return _smollm2(store or open_store())
    return bases.resolve(spec, revision=revision, offline=offline, fetch=fetch, relative_to=relative_to)


def find_base_headers(
    spec: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    relative_to: Path | None = None,
    store: Store | None = None,
) -> tuple[ResolvedBase, Mapping[str, TensorSpec]]:
    """As `model.base.resolve_headers`; raises as `find_base`."""
    if spec == SMOLLM2:
        here = _smollm2(store or open_store())
        assert here.directory is not None
        return here, open_checkpoint(here.directory).tensors
    return bases.resolve_headers(spec, revision=revision, offline=offline, relative_to=relative_to)


def directory_of(spec: str) -> Path:
    """The directory of the base `spec`, fetched or made where it is not here; raises as `find_base`."""
    directory = find_base(spec).directory
    assert directory is not None  # only a plan leaves it open
    return directory


def _smollm2(store: Store) -> ResolvedBase:
    gguf = packaged_gguf()
    request: dict[str, Json] = {PACKAGE: version(PACKAGE), "version": VERSION}
    key = digest(request)
    artifact = store.find(_STAGE, key)
    if artifact is None:
        report.info(f"{SMOLLM2}: making the checkpoint of {PACKAGE}, once")
        artifact = _made(Store(store.root), key, request, gguf)
    return bases.at(SMOLLM2, artifact.path)


def _made(store: Store, key: str, request: dict[str, Json], gguf: Path) -> Artifact:
    def build(out: Path) -> dict[str, object]:
        made: dict[str, object] = to_plain(worker.perform(make_smollm2, MakeRequest(gguf, out)))
        return made

    return store.build(_STAGE, key, request, build)
