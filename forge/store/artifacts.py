"""What stages made, kept under the digest of the request that it was made from.

    FORMAT                          the number of this layout
    digests.jsonl                   digests of files outside the store (a cache)
    locks/<stage>-<key>.lock        held while <key> is made
    artifacts/<stage>/<key>.partial/    being made, or left by a run that was killed
    artifacts/<stage>/<key>/        published: outputs, logs/, artifact.json

An artifact's outputs are all its files but `work/` (resumable state, kept when a run is killed and
removed at publication), `logs/` and the manifest. The manifest `artifact.json` is written last,
then one rename publishes. A directory is an artifact only if its manifest is valid, its facts are
those that were written, and its outputs have the sizes that it says.

Not covered: outputs changed without changing their size (they are read-only for that reason).
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from forge.codec import Json, from_plain
from forge.errors import DataError
from forge.files import kept_json, no_pipe, write_text
from forge.store.digest import DigestCache, digest, names_digest
from forge.store.lock import hold_lock
from forge.store.publication import (
    MANIFEST,
    PARTIAL,
    WORK,
    Output,
    fill,
    finish_replacement,
    give_final_name,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

FORMAT = 1

Facts: TypeAlias = Mapping[str, Json]
Request: TypeAlias = Mapping[str, Json]
# What a build gives of its artifact: a dataclass, or values by name.
Made: TypeAlias = "DataclassInstance | Mapping[str, object]"
Build: TypeAlias = Callable[[Path], Made]


@dataclass(frozen=True)
class Artifact:
    """A published result.

    `key` is the digest of its request, `digest` is over its output files' names and bytes only,
    `facts` are plain JSON, `recorded` are packages that were used without being part of the
    request, `seconds` is how long it took to make.
    """

    stage: str
    key: str
    digest: str
    path: Path
    facts: Facts
    request: Request = field(default_factory=dict)
    outputs: Mapping[str, Output] = field(default_factory=dict)
    recorded: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def read(self, kind: type[T]) -> T:
        """The facts as the dataclass that the stage made; raises `ValueError` where they are none."""
        return from_plain(kind, self.facts)


def open_store(*, read_only: bool = False) -> Store:
    """The user's store: FORGE_HOME, else the platform's data directory."""
    home = os.environ.get("FORGE_HOME")
    if home:
        return Store(Path(home).expanduser(), read_only=read_only)
    from platformdirs import user_data_path  # here: costs more than opening the store

    return Store(user_data_path("forge", appauthor=False), read_only=read_only)


class Store:
    """Artifacts on disk. Nothing is written before the first `build`; with `read_only`, nothing at all."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        """Raises `DataError` when the store was written by a newer version."""
        self.root = root.absolute()
        self.read_only = read_only
        _check_format(self.root)

    @functools.cached_property
    def digests(self) -> DigestCache:
        """The cache of digests of the user's files."""
        return DigestCache(self.root / "digests.jsonl", read_only=self.read_only)

    def path(self, stage: str, key: str) -> Path:
        """Where the artifact is, or will be."""
        return self.root / "artifacts" / stage / key

    def partial(self, stage: str, key: str) -> Path:
        return self.path(stage, key + PARTIAL)

    def lock(self, stage: str, key: str) -> Path:
        return self.root / "locks" / f"{stage}-{key}.lock"

    def find(self, stage: str, key: str) -> Artifact | None:
        """The published artifact; None when there is none or its directory is not whole."""
        return _read(self.path(stage, key), stage, key)

    def work(self, stage: str, key: str) -> Path:
        """Where a build that was stopped has left what the next one may go on from."""
        return self.partial(stage, key) / WORK

    def directories(self) -> Iterator[tuple[str, str, Path]]:
        """Everything under `artifacts/`, whole or not: (stage, directory name, path), in order."""
        for path in sorted((self.root / "artifacts").glob("*/*")):
            if path.is_dir():
                yield path.parent.name, path.name, path

    def build(
        self,
        stage: str,
        key: str,
        request: Request,
        build: Build,
        *,
        recorded: Mapping[str, str] | None = None,
        run: str = "",
        replace: bool = False,
    ) -> Artifact:
        """Find the artifact of `request`, or make it by calling `build` with an empty directory.

        Empty but for `work/`, which is as a stopped run left it. One process makes a key at a
        time; others wait, say for whom (`run`), and find it. `replace` makes it anew even though
        it is there. What `build` raises passes through: then only `work/` stays, if it holds anything.
        Raises `DataError` when the store cannot be written.
        """
        if digest(request) != key:
            raise ValueError(f"{key} is not the digest of the request of {stage}")
        self.prepare()
        final, partial = self.path(stage, key), self.partial(stage, key)
        with hold_lock(self.lock(stage, key), what=stage, run=run):
            finish_replacement(final)
            complete = _read(partial, stage, key) is not None  # killed just before its publication
            kept = self.find(stage, key)
            if kept and not (replace or complete):
                return kept
            if not complete:
                head: dict[str, Json] = {"format": FORMAT, "stage": stage, "key": key, "request": request}
                fill(partial, head, build, recorded or {})
            give_final_name(partial, final)
            published = self.find(stage, key)
        assert published is not None, f"{final} was just published"
        return published

    def prepare(self) -> None:
        """Make the store's directory, if it is not there yet."""
        if self.read_only:
            raise RuntimeError("this store was opened to be read only")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / "FORMAT").exists():
                write_text(self.root / "FORMAT", f"{FORMAT}\n")
        except OSError as failure:
            raise DataError(
                f"the store {self.root} cannot be written: {failure.strerror}",
                hint="set FORGE_HOME to a directory of yours",
            ) from failure


def _check_format(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise DataError(f"the store {root} is not a directory", hint="set FORGE_HOME to a directory of yours")
    try:
        text = no_pipe(root / "FORMAT").read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, UnicodeDecodeError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise DataError(f"{root / 'FORMAT'}: cannot be read: {reason}") from failure
    if not text.isdecimal():
        raise DataError(f"{root / 'FORMAT'}: not a number: {text[:40]!r}", hint="is this a store of forge?")
    if int(text) > FORMAT:
        raise DataError(
            f"the store {root} has format {text}; this forge knows formats up to {FORMAT}",
            hint="upgrade forge, or set FORGE_HOME to another directory",
        )


def _read(path: Path, stage: str, key: str) -> Artifact | None:
    try:
        manifest = kept_json(path / MANIFEST)
        outputs = {name: Output(**entry) for name, entry in manifest["outputs"].items()}
        whole = (
            (manifest["format"] <= FORMAT and manifest["stage"] == stage and manifest["key"] == key)
            and digest(manifest["request"]) == key
            # Earlier versions did not seal what a stage reports.
            and manifest.get("sealed") in (None, digest([manifest["facts"], manifest["recorded"]]))
            and names_digest({name: output.sha256 for name, output in outputs.items()}) == manifest["digest"]
            and all(_size(path / name) == output.bytes for name, output in outputs.items())
        )
        if not whole:
            return None
        return Artifact(
            stage=stage,
            key=key,
            digest=manifest["digest"],
            path=path,
            facts=dict(manifest["facts"]),
            request=manifest["request"],
            outputs=outputs,
            recorded=dict(manifest["recorded"]),
            seconds=float(manifest["seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not a manifest of ours, whatever it is


def _size(path: Path) -> int:
    status = path.lstat()
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
