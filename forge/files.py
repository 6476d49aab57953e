"""The one way to write a file, and to hash one.

A file is there whole or not at all, also after a power cut. `store.digest` hashes with a cache and a progress
line, for files of gigabytes.

Not covered: file systems that lie about fsync.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file or a directory (its names) to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in one step; a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """The digest of the file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
