"""A file is there whole or as it was before, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from forge.errors import DataError
from forge.files import (
    is_locked,
    kept_json,
    lock_file,
    open_lock,
    sha256_of,
    small_text,
    work_beside,
    write_text,
)
from forge.model.gguf_header import read_gguf
from forge.store.artifacts import Store
from tests.conftest import tree


def test_the_text_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fsync` sees the new text beside the old file, then the directory with the new one."""
    path, seen, fsync = tmp_path / "manifest.json", list[tuple[str, str]](), os.fsync
    path.write_text("old")

    def watched(handle: int) -> None:
        flushed = Path(f"/proc/self/fd/{handle}").readlink()
        seen.append((flushed.read_text() if flushed.is_file() else flushed.name, path.read_text()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_text(path, "new ü")
    assert seen == [("new ü", "old"), (tmp_path.name, "new ü")]
    assert tree(tmp_path) == {"manifest.json": "new ü".encode()}


def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "manifest.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert tree(tmp_path) == {"manifest.json": b"old"}


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_lock_keeps_others_out_until_the_file_is_closed(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "a.lock"
    assert not is_locked(lock) and not lock.parent.exists()
    with lock_file(lock) as is_ours:
        assert is_ours and is_locked(lock)
        with lock_file(lock) as is_theirs:
            assert not is_theirs
    assert not is_locked(lock)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(DataError, match="files cannot be locked here: Function not implemented"):
        with lock_file(tmp_path / "a.lock"):
            pass


def test_a_working_directory_is_of_one_process_and_goes_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    (tmp_path / ".out.gguf.partial").mkdir()
    (tmp_path / ".out.gguf.partial" / "left").touch()
    with work_beside(out) as work:
        assert not any(work.iterdir())
        with pytest.raises(DataError, match="another command writes"):
            with work_beside(out):
                pass
    assert not any(tmp_path.iterdir())


def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(tmp_path: Path) -> None:
    """Of each kind that the store reads or locks: nobody ever writes into it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (kept_json, sha256_of):
        with pytest.raises(OSError, match="a pipe or a device"):
            read(pipe)
    with pytest.raises(DataError, match="a pipe or a device"):
        open_lock(pipe)
    os.mkfifo(tmp_path / "FORMAT")
    with pytest.raises(DataError, match="FORMAT: cannot be read: it is a pipe or a device"):
        Store(tmp_path)
    (tmp_path / "model.gguf").symlink_to(pipe)
    with pytest.raises(DataError, match="a pipe or a device"):
        read_gguf(tmp_path / "model.gguf")


def test_a_device_that_never_ends_is_not_read_for_ever() -> None:
    with pytest.raises(OSError, match="larger than 16 MB"):
        small_text(Path("/dev/zero"))
