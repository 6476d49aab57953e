"""Locks between processes: the operating system frees them when their holder dies.

Who holds a lock, for which run and since when stands beside it, so that whoever waits can say for
whom. A child program does not inherit a lock (its descriptor is closed on exec).

Not covered: file systems without flock, where filelock falls back to a file that a killed
process leaves behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from forge import report


@contextlib.contextmanager
def hold(path: Path, *, what: str, run: str = "") -> Iterator[None]:
    """Hold the lock `path`, waiting for it if need be, and say once for whom.

    `what` is being made (for the message), `run` is the name of the run that makes it.
    """
    from filelock import FileLock, Timeout  # here: it takes longer to import than a plan to compute

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report.info(f"{what}: waiting for {holder(path)}")
        lock.acquire(poll_interval=0.2)
    beside = _beside(path)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        beside.write_text(json.dumps({"pid": os.getpid(), "run": run, "since": since}), encoding="utf-8")
        yield
    finally:
        beside.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def hold_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock `path` if nobody does; whether that worked."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def holder(path: Path) -> str:
    """Who holds the lock, in words."""
    try:
        told = json.loads(_beside(path).read_text(encoding="utf-8"))
        run = f"run {told['run']}, " if told["run"] else ""
        return f"process {told['pid']} ({run}since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it took the lock a moment ago and has not yet said who it is


def _beside(path: Path) -> Path:
    return path.with_suffix(".holder")
