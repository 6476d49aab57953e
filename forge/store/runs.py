"""Which runs use this store, what each was made from, and how their files get to where a person looks.

A run is a directory. The store remembers, per run, the request of every stage of its last ship:
so a plan can say what changed, and nothing that a run uses is collected. Writing to one run is
serialized by `hold`.

Not covered: a run directory that is moved is a new run; ship it once more to register it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from forge.files import kept_json, write_text
from forge.store.artifacts import Request, Store
from forge.store.digest import digest
from forge.store.lock import hold_lock

How: TypeAlias = Literal["copied", "reflinked", "linked"]

# _IOW(0x94, 9, int) of linux/fs.h; Python has a name for it from 3.12 on.
_FICLONE = 0x40049409
# Smaller files are copied: the copy costs nothing and can be edited.
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class Run:
    """A registered run: its directory and the requests of its last ship, by stage."""

    directory: Path
    requests: Mapping[str, Request]

    @property
    def name(self) -> str:
        return self.directory.name


@contextlib.contextmanager
def hold_run(store: Store, directory: Path) -> Iterator[None]:
    """Be the only process that ships into `directory`; wait for another, saying for whom."""
    store.prepare()
    lock = store.root / "locks" / f"run-{_record(store, directory).stem}.lock"
    with hold_lock(lock, what=directory.name, run=directory.name):
        yield


def register(store: Store, directory: Path) -> None:
    """Make the run known to the store; once is enough."""
    if not _record(store, directory).exists():
        remember(store, directory, {})


def remember(store: Store, directory: Path, requests: Mapping[str, Request]) -> None:
    """Keep the requests of the run's stages, in place of the earlier ones."""
    store.prepare()
    record = _record(store, directory)
    record.parent.mkdir(exist_ok=True)
    content = {"directory": str(directory.resolve()), "requests": dict(requests)}
    write_text(record, json.dumps(content, indent=1) + "\n")


def requests(store: Store, directory: Path) -> Mapping[str, Request]:
    """The requests of the run's last ship, by stage; empty for a run that the store does not know."""
    run = _read(_record(store, directory))
    return run.requests if run else {}


def runs(store: Store) -> list[Run]:
    """All registered runs whose directory is there, by name."""
    records = (_read(path) for path in (store.root / "runs").glob("*.json"))
    present = [run for run in records if run and run.directory.is_dir()]
    return sorted(present, key=lambda run: (run.name, str(run.directory)))


def publish(source: Path, target: Path) -> set[How]:
    """Put an artifact's file or directory where a person looks for it, replacing what is there.

    Text and small files are copied, so that they can be edited; large ones are reflinked where the
    file system can, else hard-linked (read-only), else copied. Returns which of these it did. The
    target appears in one step; a directory has exactly the source's files then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.partial")
    _remove(beside)
    how: set[How] = set()
    try:
        if source.is_dir():
            beside.mkdir()
            for path in sorted(source.rglob("*")):
                if path.is_dir():
                    (beside / path.relative_to(source)).mkdir()
                else:
                    how.add(_place(path, beside / path.relative_to(source)))
        else:
            how.add(_place(source, beside))
        if source.is_dir() or target.is_dir():
            _remove(target)
        beside.replace(target)
    finally:
        _remove(beside)
    return how


def _place(source: Path, target: Path) -> How:
    if source.stat().st_size > _SMALL_BYTES and not _is_text(source):
        if _reflink(source, target):
            return "reflinked"
        # Another file system, one without links, or a source that is not ours to link.
        with contextlib.suppress(OSError):
            target.hardlink_to(source)
            return "linked"
    shutil.copyfile(source, target)
    return "copied"


def _is_text(path: Path) -> bool:
    """As git decides it: no NUL byte near the start."""
    with path.open("rb") as stream:
        return b"\0" not in stream.read(8000)


def _reflink(source: Path, target: Path) -> bool:
    """Share the source's blocks, copied on write: btrfs, xfs, bcachefs on Linux."""
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as original, target.open("xb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
            return True
        except OSError:
            target.unlink()
            return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _record(store: Store, directory: Path) -> Path:
    return store.root / "runs" / f"{digest(str(directory.resolve()))[:16]}.json"


def _read(record: Path) -> Run | None:
    try:
        content = kept_json(record)
        return Run(Path(content["directory"]), dict(content["requests"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # as good as never registered: the next ship writes it anew
