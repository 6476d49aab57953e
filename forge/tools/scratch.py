"""Directories for temporary files, named after what they are for and the process that has them.

What a killed process left is taken away when the next directory of its kind is made. Not covered: a process
number that was given out again in between; then it stays until that process ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil


def make(kind: str, place: Path | None = None) -> Path:
    """An empty directory in `place`, by default where the system has such; whoever makes it removes it."""
    prefix, place = f"forge-{kind}-", place or Path(tempfile.gettempdir())
    for left in place.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place))


@contextlib.contextmanager
def scratch(kind: str, place: Path | None = None) -> Iterator[Path]:
    """One that is gone after the block."""
    made = make(kind, place)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
