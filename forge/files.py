"""The one way to write a file, to hash one, and to lock one.

A file is there whole or not at all, also after a power cut. `store.digest` hashes with a cache and a progress
line, for files of gigabytes. The operating system frees a lock when its holder dies; a child program does
not inherit it (its descriptor is closed on exec).

Not covered: file systems that lie about fsync, and those without flock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from forge import report
from forge.errors import DataError

_CHUNK = 1 << 20
_MOST_SMALL = 16 << 20


def sync(path: Path) -> None:
    """Flush a file or a directory (its names) to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in one step; a reader sees the old file or the new one.

    Half a character, which a message may quote, is written out as JSON and Python write it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def no_pipe(path: Path) -> Path:
    """The path itself; raises `OSError` for a pipe or a device, on which a reader would wait for ever."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return path
    raise OSError(errno.EINVAL, "it is a pipe or a device, no file", str(path))


def small_text(path: Path) -> str:
    """The text of a file that somebody names, or of a pipe; raises `OSError` too where it does not end."""
    with path.open("rb") as stream:
        content = stream.read(_MOST_SMALL + 1)
    if len(content) > _MOST_SMALL:
        raise OSError(errno.EFBIG, f"larger than {_MOST_SMALL >> 20} MB", str(path))
    return content.decode("utf-8-sig")


def kept_json(path: Path) -> Any:
    """What a JSON file of forge's own holds; raises `OSError`, or `ValueError` for what is none."""
    try:
        return json.loads(no_pipe(path).read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def try_lock(opened: IO[bytes] | int) -> bool:
    """Lock an open file or directory until it is closed; False where another process has the lock."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DataError(
            f"files cannot be locked here: {error.strerror}",
            hint="the file system has no flock: set FORGE_HOME to another, or mount it with flock",
        ) from error
    return True


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, which is made, until the block ends; False where another process does."""
    with open_lock(path) as opened:
        yield try_lock(opened)


def open_lock(path: Path) -> IO[bytes]:
    """Open the lock file `path`, which is made; raises `DataError` where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return (no_pipe(path) if path.exists() else path).open("ab")
    except OSError as error:
        raise DataError(
            f"{path} cannot be locked: {error.strerror}",
            hint="forge makes this file itself: remove what is in its place, or set FORGE_HOME to another "
            "directory",
        ) from error


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path`."""
    if not path.exists():
        return False
    with lock_file(path) as is_ours:
        return not is_ours


def chunks_of(path: Path, label: str) -> Iterator[bytes]:
    """The file's bytes in pieces, with the progress shown as `label`."""
    total, done = no_pipe(path).stat().st_size, 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk
            done += len(chunk)
            report.advance(label, done, max(total, done))


def sha256_of(path: Path, label: str = "") -> str:
    """The digest of the file's bytes, in hexadecimal; with a `label` the progress is shown as that."""
    if label:
        digest = hashlib.sha256()
        for chunk in chunks_of(path, label):
            digest.update(chunk)
        return digest.hexdigest()
    with no_pipe(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_same_piece(path: Path, start: int, other: Path, other_start: int, count: int) -> bool:
    """Whether `count` bytes of two files are the same, from a place in each."""
    with path.open("rb") as first, other.open("rb") as second:
        first.seek(start)
        second.seek(other_start)
        pieces = (min(_CHUNK, count - at) for at in range(0, count, _CHUNK))
        return all(first.read(piece) == second.read(piece) for piece in pieces)


@contextlib.contextmanager
def work_beside(out: Path) -> Iterator[Path]:
    """An empty directory beside `out` that only this process works in; it is removed afterwards.

    What a killed process left in it is cleared: it may be of another kind. Raises `DataError` when another
    process has it, or it cannot be made.
    """
    work = out.with_name(f".{out.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        directory = os.open(work, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{out.parent} cannot be written: {error.strerror}") from error
    try:
        if not try_lock(directory):
            raise DataError(f"another command writes {out} just now", hint="wait for its end")
        try:
            _clear(work)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(directory)


def _clear(directory: Path) -> None:
    """Remove what is inside; the directory itself is what is locked."""
    try:
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise DataError(f"{directory} cannot be cleared: {error.strerror}", hint="remove it") from error
