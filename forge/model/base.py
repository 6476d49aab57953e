"""From what a recipe calls its base (or adapter, or data) to a directory on this disk.

`builtin:tiny`, a directory (relative to the recipe's) or a hub id `organisation/name[@revision]`;
`builtin:smollm2`, which is made first, is found by `resolve.bases`.
What is on disk wins: a name that is a directory is never asked for on the hub.

Not covered: what is in the directory; `checkpoint`, `config` and `tokenizer_files` read that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forge.errors import DataError, Problem
from forge.model.checkpoint import open_checkpoint
from forge.model.hub_repository import Kind, Repository, cache_directory, is_offline
from forge.model.licence import licence_warning, read_licence
from forge.model.safetensors_header import TensorSpec

BUILTIN = Path(__file__).with_name("builtin")
_PREFIX = "builtin:"
UNKNOWN = "unknown until fetched"


@dataclass(frozen=True)
class ResolvedBase:
    """Where a base is. `directory` is None only if it was not fetched because nobody asked to.

    `revision` is the commit of a hub base, None for a directory. `problems` are not errors: what a
    plan should show, such as a licence without commercial use.
    """

    spec: str
    directory: Path | None
    revision: str | None
    licence: str | None
    problems: tuple[Problem, ...] = ()


def resolve(
    spec: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    fetch: bool = True,
    relative_to: Path | None = None,
) -> ResolvedBase:
    """Find the base (or hub adapter) that `spec` names, downloading it if `fetch` and not `offline`.

    Raises `DataError` if there is none, and what `hub.fetch_snapshot` raises. With `fetch=False` only
    local files are read, and a hub base that is not here in full has no directory.
    """
    if spec.startswith(_PREFIX):
        return at(spec, _builtin(spec.removeprefix(_PREFIX)))
    directory = local_directory(spec, relative_to)
    if directory is not None:
        if revision is not None:
            raise DataError(
                f"{directory}: a directory has no revision (got {revision!r})",
                hint="leave out the revision, or name the hub id",
            )
        return at(spec, directory)
    return _from_hub(spec, _repository(spec, revision, "model"), offline=offline, fetch=fetch)


def resolve_headers(
    spec: str, *, revision: str | None = None, offline: bool = False, relative_to: Path | None = None
) -> tuple[ResolvedBase, Mapping[str, TensorSpec]]:
    """Like `resolve`, with the base's tensors, but of a hub base that is not here only headers are read.

    Its directory then holds the small files only. Raises as `resolve` and `open_checkpoint`.
    """
    offline = offline or is_offline()
    here = resolve(spec, revision=revision, fetch=offline, offline=offline, relative_to=relative_to)
    if here.directory is not None:
        return here, open_checkpoint(here.directory).tensors
    from forge.model import hub

    snapshot, tensors = hub.fetch_headers(_repository(spec, revision, "model"))
    return at(spec, snapshot.directory, snapshot.commit), tensors


def fetch_dataset(spec: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The directory of a dataset repository's files of rows; raises as `resolve`."""
    base = _from_hub(spec, _repository(spec, revision, "dataset"), offline=offline, fetch=True)
    assert base.directory is not None
    return base.directory


def local_directory(spec: str, relative_to: Path | None = None) -> Path | None:
    """The directory that `spec` names, or None if it can only be a hub id.

    Raises `DataError` if it is written as a path and is not a directory.
    """
    path = Path(spec).expanduser()
    path = (relative_to or Path()) / path
    if path.is_dir():
        return path.resolve()
    if path.suffix == ".gguf" or path.is_file():
        raise DataError(
            f"{path}: a file, not a base",
            hint="a base is a directory with config.json, tokenizer and safetensors, or a hub id",
        )
    if spec.startswith((".", "/", "~")) or "\\" in spec or spec.count("/") > 1:
        raise DataError(
            f"{path}: no such directory",
            hint="base takes a hub id, a directory, builtin:tiny or builtin:smollm2",
        )
    return None


def _builtin(name: str) -> Path:
    directory = BUILTIN / name
    if name and directory.parent == BUILTIN and (directory / "config.json").is_file():
        return directory
    known = sorted(path.parent.name for path in BUILTIN.glob("*/config.json"))
    raise DataError(
        f"{_PREFIX}{name}: no such built-in base",
        hint="there is " + ", ".join(_PREFIX + name for name in (*known, "smollm2")),
    )


def _repository(spec: str, revision: str | None, kind: Kind) -> Repository:
    name, _, inline = spec.partition("@")
    if inline and revision and inline != revision:
        raise DataError(f"{spec}: two revisions: {inline!r} and {revision!r}", hint="leave one of them out")
    return Repository(name, revision or inline or "main", kind)


def at(spec: str, directory: Path, revision: str | None = None) -> ResolvedBase:
    """The base `spec` in `directory`, with its licence and what to know of that."""
    licence = read_licence(directory)
    warning = licence_warning(licence)
    return ResolvedBase(spec, directory, revision, licence, (Problem(warning, "base"),) if warning else ())


def _from_hub(spec: str, repository: Repository, *, offline: bool, fetch: bool) -> ResolvedBase:
    from forge.model import hub  # here, because huggingface_hub takes a while to import
    from forge.model.hub_errors import NotAnIdError

    if fetch and not (offline or is_offline()):
        snapshot = hub.fetch_snapshot(repository)
        return at(spec, snapshot.directory, snapshot.commit)
    try:
        here = hub.local_snapshot(repository)
    except DataError as error:
        if fetch or isinstance(error, NotAnIdError):
            raise
        return ResolvedBase(spec, None, None, None, (Problem(f"{UNKNOWN}: {error.message}", "base"),))
    if here is not None:
        return at(spec, here.directory, here.commit)
    if fetch:
        raise DataError(
            f"{spec}: not in {cache_directory()}, and the hub may not be asked (offline)",
            hint="run it once with the network, or give `base` the directory of a copy",
        )
    return ResolvedBase(spec, None, None, None, (Problem(f"{spec}: {UNKNOWN}", "base"),))
