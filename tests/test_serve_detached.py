"""The list of what runs in the background, where one server of a name follows another."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import filelock
import psutil
import pytest

from forge import process
from forge.errors import DataError, RecipeError
from forge.serve import detached

_SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]
_SERVES = "import sys, time; lock = open(sys.argv[1], 'ab'); print('ready', flush=True); time.sleep(60)"


@contextlib.contextmanager
def _serving(lock: Path) -> Iterator[process.Child]:
    """A process that has the lock open, as a server has its own."""
    with process.Child([sys.executable, "-c", _SERVES, str(lock)]) as child:
        assert next(child.lines()) == "ready"
        yield child


def _recorded(path: Path, pid: int) -> detached.Served:
    served = detached.Served("tiny", "http://127.0.0.1:9", "tiny", "embedded", pid, None, "now")
    path.write_text(json.dumps(asdict(served)))
    return served


def test_a_name_whose_server_still_loads_is_taken(tmp_path: Path) -> None:
    """Its files are its own: the second command takes none of them away."""
    lock = tmp_path / "tiny.lock"
    with filelock.FileLock(lock):
        with pytest.raises(RecipeError, match="tiny is being served already"):
            detached.detach(tmp_path, "tiny", [sys.executable, "-c", ""])
        assert [path.name for path in tmp_path.iterdir()] == ["tiny.lock"]


@pytest.mark.programs
def test_a_stopped_servers_name_may_be_the_next_ones_already(tmp_path: Path) -> None:
    """Its lock is held by then: nobody waits for that. Of the one that was killed no record is left."""
    record = tmp_path / "tiny.json"
    lock = tmp_path / "tiny.lock"
    with _serving(lock) as child, filelock.FileLock(lock):
        served = _recorded(record, child.pid)
        begun = time.monotonic()
        assert detached.stop_servers(tmp_path, "tiny") == [served]
        assert time.monotonic() - begun < 30
        assert child.ends_within(30)
        assert not record.exists()


@pytest.mark.programs
def test_what_a_command_that_still_starts_one_wrote_stays(tmp_path: Path) -> None:
    """Its server does not hold the lock yet, and it waits for its own file; of the ended nothing is left."""
    with process.Child(_SLEEPS) as ended:
        ended.kill()
    with _serving(tmp_path / "tiny.lock") as served, process.Child(_SLEEPS) as starting:
        for pid in (ended.pid, starting.pid, os.getpid()):
            for kind in ("out", "log"):
                (tmp_path / f"tiny.{pid}.{kind}").touch()
        lock = filelock.FileLock(tmp_path / "tiny.lock")
        lock.acquire()
        _recorded(tmp_path / "tiny.json", served.pid)
        assert [one.name for one in detached.running(tmp_path)] == ["tiny"]
        lock.release()
        assert detached.running(tmp_path) == []
        kept = {f"tiny.{starting.pid}.{kind}" for kind in ("out", "log")}
        assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.programs
def test_what_the_next_one_of_a_name_wrote_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may say that it serves while the one before is still being stopped."""
    record = tmp_path / "tiny.json"
    lock = tmp_path / "tiny.lock"
    with _serving(lock) as child, filelock.FileLock(lock):
        _recorded(record, child.pid)
        end = psutil.Process.terminate
        next_one = os.open(lock, os.O_RDONLY)

        def end_and_be_followed(self: psutil.Process) -> None:
            end(self)
            _recorded(record, os.getpid())

        monkeypatch.setattr(psutil.Process, "terminate", end_and_be_followed)
        detached.stop_servers(tmp_path, "tiny")
        assert [one.pid for one in detached.running(tmp_path)] == [os.getpid()]
        os.close(next_one)


@pytest.mark.programs
def test_a_record_of_what_was_killed_lists_nothing(tmp_path: Path) -> None:
    """Not even while the next one of that name, which still loads, holds the lock."""
    with process.Child(_SLEEPS) as child:
        child.kill()
    _recorded(tmp_path / "tiny.json", child.pid)
    with filelock.FileLock(tmp_path / "tiny.lock"):
        assert detached.running(tmp_path) == []
    _recorded(tmp_path / "tiny.json", os.getpid())
    with detached.announced(tmp_path, "tiny"):
        assert detached.running(tmp_path) == []
        with pytest.raises(DataError, match="tiny is not running yet: it still loads"):
            detached.stop_servers(tmp_path, "tiny")


@pytest.mark.programs
@pytest.mark.parametrize(
    "edit", [{"pid": None}, {"pid": -1}, {"pid": 2**70}, {"pid": "1"}, {"name": "other"}]
)
def test_a_record_that_was_edited_ends_no_other_process(tmp_path: Path, edit: dict[str, object]) -> None:
    """Whatever number it has: only the process that has the lock open is the server."""
    lock, record = tmp_path / "tiny.lock", tmp_path / "tiny.json"
    with process.Child(_SLEEPS) as other, _serving(lock) as child, filelock.FileLock(lock):
        fields = asdict(_recorded(record, child.pid))
        record.write_text(
            json.dumps({**fields, **{name: value or other.pid for name, value in edit.items()}})
        )
        assert detached.running(tmp_path) == []
        with pytest.raises(DataError, match="its record does not name the process that serves it"):
            detached.stop_servers(tmp_path, "tiny")
        assert detached.stop_servers(tmp_path) == []
        assert other.status is None and child.status is None and record.exists()


@pytest.mark.parametrize("name", ["bad.json", "bad.lock"])
def test_a_directory_among_the_records_is_reported(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    if name == "bad.lock":
        (tmp_path / "bad.json").touch()
    assert detached.running(tmp_path) == [] and detached.stop_servers(tmp_path) == []
    assert f"{tmp_path / 'bad.json'} is left out: " in capsys.readouterr().err
