"""Locks between processes that say who holds them.

For which run a lock is held and since when stands beside it, so that whoever waits can say for whom.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from forge import report
from forge.files import kept_json, open_lock, try_lock


@contextlib.contextmanager
def hold_lock(path: Path, *, what: str, run: str = "") -> Iterator[None]:
    """Hold the lock `path`, waiting for it if need be, and say once for whom.

    `what` is being made (for the message), `run` is the name of the run that makes it.
    """
    with open_lock(path) as opened:
        if not try_lock(opened):
            report.info(f"{what}: waiting for {holder(path)}")
            fcntl.flock(opened, fcntl.LOCK_EX)
        beside = _beside(path)
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            beside.write_text(json.dumps({"pid": os.getpid(), "run": run, "since": since}), encoding="utf-8")
            yield
        finally:
            beside.unlink(missing_ok=True)


def holder(path: Path) -> str:
    """Who holds the lock, in words."""
    try:
        held = kept_json(_beside(path))
        run = f"run {held['run']}, " if held["run"] else ""
        return f"process {held['pid']} ({run}since {held['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it took the lock a moment ago and has not yet said who it is


def _beside(path: Path) -> Path:
    return path.with_suffix(".holder")
