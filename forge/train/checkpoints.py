"""Checkpoints that a run goes on from: whole ones only.

The marker is written last and holds the digest of every file, so that a checkpoint which was cut off,
or damaged since, is told from a whole one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from forge import report
from forge.files import kept_json, sha256_of
from forge.train.ranks import rank, wait_for_all

MARKER = "complete"


def seal(directory: Path) -> None:
    """Write the marker of a checkpoint that is complete: that every process has written its part of."""
    wait_for_all()
    if rank() == 0:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        digests = {path.relative_to(directory).as_posix(): sha256_of(path) for path in files}
        (directory / MARKER).write_text(json.dumps(digests))
    wait_for_all()


def last_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint; a damaged one is reported and removed, and the one before is taken."""
    sealed = [path for path in directory.glob("checkpoint-*") if (path / MARKER).exists()]
    for path in sorted(sealed, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        fault = _fault(path)
        if not fault:
            return path
        report.warning(f"train: {path.name} is damaged ({fault}); it is left out")
        shutil.rmtree(path)
    return None


def _fault(directory: Path) -> str:
    """What is wrong with a sealed checkpoint, or nothing."""
    try:
        digests: Mapping[str, str] = dict(kept_json(directory / MARKER))
    except (OSError, TypeError, ValueError):
        return f"{MARKER} cannot be read"
    for name, digest in digests.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} has other bytes than were written"
    return ""
