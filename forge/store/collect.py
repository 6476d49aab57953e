"""What the store holds that no run uses, and its removal.

In use is what a registered run's last ship was made from, and what the manifest.json of a run
names. Adapters (the stage `train`) cost the most to make and go only when asked, as do directories
that stopped runs left with something to go on from. What a process holds the lock of is not touched.

Not covered: an artifact that a ship found a moment ago and has not yet noted as its own; the ship
then fails on a missing file and can be started again.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from forge.files import is_locked, kept_json, lock_file
from forge.store.artifacts import Store
from forge.store.digest import digest
from forge.store.publication import PARTIAL
from forge.store.runs import runs

Kind: TypeAlias = Literal["artifact", "adapter", "partial"]

ADAPTER_STAGE = "train"
_DELETED = ".deleted"


@dataclass(frozen=True)
class Removable:
    """A directory that could go. `bytes` are those of its files that no run shares by a hard link."""

    kind: Kind
    stage: str
    key: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class Garbage:
    """What could go, and the size of what stays because a run uses it."""

    items: tuple[Removable, ...]
    used_bytes: int

    def bytes(self, *kinds: Kind) -> int:
        """The bytes of the items of these kinds; of all without any."""
        return sum(item.bytes for item in self.items if not kinds or item.kind in kinds)


def find_garbage(store: Store) -> Garbage:
    """Look, and change nothing."""
    used = _used_keys(store)
    items: list[Removable] = []
    used_bytes = 0
    for stage, name, path in store.directories():
        key, dot, ending = name.partition(".")
        kind: Kind = "adapter" if stage == ADAPTER_STAGE else "artifact"
        if dot + ending in (PARTIAL, _DELETED):
            kind = "partial"
        elif key in used:
            used_bytes += _bytes(path)
            continue
        if not is_locked(store.lock(stage, key)):
            items.append(Removable(kind, stage, key, path, _bytes(path)))
    return Garbage(tuple(items), used_bytes)


def collect(store: Store, *, adapters: bool = False, partials: bool = False) -> Garbage:
    """Remove what no run uses, adapters and partial directories only when asked; what was removed."""
    kinds = {"artifact", *(["adapter"] if adapters else []), *(["partial"] if partials else [])}
    garbage = find_garbage(store)
    removed = [item for item in garbage.items if item.kind in kinds and _remove(store, item)]
    return Garbage(tuple(removed), garbage.used_bytes)


def _remove(store: Store, item: Removable) -> bool:
    with lock_file(store.lock(item.stage, item.key)) as is_ours:
        if not is_ours or not item.path.exists():
            return False
        if item.kind != "partial" and item.key in _used_keys(store):
            return False  # a ship took it up since the plan
        # Out of the way in one step: an artifact is never there in part.
        doomed = item.path.with_name(item.key + _DELETED)
        if item.path != doomed:
            shutil.rmtree(doomed, ignore_errors=True)
            item.path.rename(doomed)
        shutil.rmtree(doomed)
        return True


def _used_keys(store: Store) -> set[str]:
    used: set[str] = set()
    for run in runs(store):
        used.update(digest(request) for request in run.requests.values())
        used.update(_keys_in(run.directory / "manifest.json"))
    return used


def _keys_in(manifest: Path) -> Iterator[str]:
    """The keys of a run's manifest.json: `artifacts: {name: {key, ...}}`."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        for entry in kept_json(manifest)["artifacts"].values():
            if isinstance(entry, dict) and isinstance(entry.get("key"), str):
                yield entry["key"]


def _bytes(directory: Path) -> int:
    files = (path.lstat() for path in directory.rglob("*") if not path.is_dir())
    return sum(status.st_size for status in files if status.st_nlink == 1)
