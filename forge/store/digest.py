"""What a value or a file is, as one SHA-256: the same content gives the same digest anywhere.

A value is digested over its canonical JSON, a file over its bytes, a tree over the relative names
and digests of its files. `DigestCache` remembers the digests of files by (real path, size,
modification time, inode), so that gigabytes are read once.

Not covered: a file changed in place with its size and modification time put back; modes, owners
and empty directories (they are not content).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from forge.codec import Json
from forge.errors import DataError
from forge.files import no_pipe, sha256_of, write_text

# A file changed again within the clock's resolution keeps its modification time; what is younger
# than this is not remembered. Two seconds is the coarsest clock of a file system in use (FAT).
_SETTLED_NANOSECONDS = 2_000_000_000

_SHOWN_BYTES = 1_000_000_000

_SHA256 = re.compile(r"[0-9a-f]{64}")

_Identity: TypeAlias = tuple[int, int, int]


def canonical(value: Json) -> str:
    """`value` as JSON in the one form that is digested: sorted keys, no spaces, floats by repr.

    Raises ValueError for NaN and infinities, TypeError for what JSON has no word for.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Json) -> str:
    """The SHA-256 of the canonical form, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path, cache: DigestCache | None = None) -> str:
    """The SHA-256 of a file's bytes. Raises `DataError` when it cannot be read or changes meanwhile."""
    try:
        before = path.stat()
        known = cache.find(path, before) if cache else None
        if known:
            return known
        # Reading a large file takes seconds: its progress is shown.
        sha256 = sha256_of(path, f"read {path.name}" if before.st_size > _SHOWN_BYTES else "")
        after = path.stat()
    except OSError as failure:
        raise DataError(f"{path}: cannot be read: {failure.strerror}") from failure
    if _identity(before) != _identity(after):
        raise DataError(f"{path}: changed while it was read", hint="wait until it is written, then try again")
    if cache:
        cache.remember(path, after, sha256)
    return sha256


def tree_digest(root: Path, paths: Iterable[Path | str], cache: DigestCache | None = None) -> str:
    """The digest of several files under `root`, given relative to it; their order is of no account."""
    names = sorted({Path(path).as_posix() for path in paths})
    return names_digest({name: file_digest(root / name, cache) for name in names})


def names_digest(files: Mapping[str, str]) -> str:
    """The digest of a set of files: relative name -> SHA-256."""
    return digest(sorted(files.items()))


class DigestCache:
    """Digests of files, kept as JSON lines that are only ever appended.

    One `write` a line, so that several processes can append at once; a line that cannot be
    understood is forgotten and its file is read again. With `read_only` nothing is written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._known: dict[str, tuple[_Identity, str]] | None = None

    def find(self, path: Path, status: os.stat_result) -> str | None:
        """The digest of `path` if it still is the file it was."""
        if self._known is None:
            self._known = self._load()
        identity, sha256 = self._known.get(os.path.realpath(path), (None, None))
        return sha256 if identity == _identity(status) else None

    def remember(self, path: Path, status: os.stat_result, sha256: str) -> None:
        if time.time_ns() - status.st_mtime_ns < _SETTLED_NANOSECONDS:
            return
        real, identity = os.path.realpath(path), _identity(status)
        if self._known is None:
            self._known = self._load()
        self._known[real] = (identity, sha256)
        if not self.read_only:
            # Only a cache: a full or read-only disk is reported by whoever writes what matters.
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.exists():
                    no_pipe(self.path)
                with self.path.open("ab", buffering=0) as stream:
                    stream.write(_line(real, identity, sha256))

    def _load(self) -> dict[str, tuple[_Identity, str]]:
        try:
            lines = no_pipe(self.path).read_bytes().splitlines()
        except OSError:
            return {}
        known: dict[str, tuple[_Identity, str]] = {}
        broken = 0
        for line in lines:
            try:
                real, size, modified, inode, sha256 = json.loads(line)
                if not _SHA256.fullmatch(sha256):
                    raise ValueError(sha256)
                known[real] = ((int(size), int(modified), int(inode)), sha256)
            except (ValueError, TypeError, RecursionError):  # not JSON, not UTF-8, not what `_line` writes
                broken += 1
        if not self.read_only and (broken or len(lines) > 2 * len(known) + 100):
            # Written anew. A line that another process appends at this moment is lost, which
            # costs reading one file once more.
            with contextlib.suppress(OSError):
                text = b"".join(_line(real, *entry) for real, entry in known.items()).decode()
                write_text(self.path, text)
        return known


def _identity(status: os.stat_result) -> _Identity:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _line(real: str, identity: _Identity, sha256: str) -> bytes:
    return (json.dumps([real, *identity, sha256]) + "\n").encode()
