"""Servers that were left running: started in the background, listed, stopped.

Each is a `forge serve` of its own that holds a lock for as long as it lives, so that a server that
was killed is known to be gone whatever its record says. A process is the server, and may be ended, only
where it has that lock's file open: a record is but a file, and numbers of processes are given again. The
key is in none of the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from forge import process, report
from forge.codec import from_plain
from forge.errors import DataError, RecipeError, StageError, error_from_json
from forge.files import is_locked, kept_json, lock_file, write_text

_SECONDS_BETWEEN = 0.05
_SECONDS_TO_STOP = 40.0


@dataclass(frozen=True)
class Served:
    """A server in the background; `pid` is that of the `forge serve` that holds it."""

    name: str
    endpoint: str
    model: str
    runtime: str
    pid: int
    container: str | None
    since: str


def running(directory: Path) -> list[Served]:
    """What runs, by name; records of what has died are taken away, and what is no record is reported."""
    servers = []
    for path in sorted(directory.glob("*.json")):
        try:
            if not is_locked(path.with_suffix(".lock")):
                _forget(path)
                continue
            served = _recorded(path)
        except (OSError, ValueError, DataError) as wrong:
            report.warning(f"{path} is left out: {wrong}")
            continue
        # A lock that the next one holds, which still loads, says nothing of the one that was killed.
        if served and _process_of(served, path):
            servers.append(served)
    return servers


def _recorded(path: Path) -> Served | None:
    """What the record says; None where there is none. Raises `OSError` or `ValueError` for what is none."""
    try:
        served = from_plain(Served, kept_json(path))
    except FileNotFoundError:
        return None
    if served.name != path.stem:
        raise ValueError(f"it is of {served.name}")
    return served


def _forget(path: Path) -> None:
    """Take away the record `path`, its lock, and what the commands that started it wrote.

    What another command that still runs wrote stays: its server may not hold the lock yet.
    """
    written = re.compile(rf"{re.escape(path.stem)}\.(\d+)\.(out|log)")
    started = {
        file: int(match[1]) for file in path.parent.iterdir() if (match := written.fullmatch(file.name))
    }
    ended = [file for file, pid in started.items() if pid == os.getpid() or not psutil.pid_exists(pid)]
    for file in (path, path.with_suffix(".lock"), *ended):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def announced(directory: Path, name: str) -> Iterator[Callable[[Served], None]]:
    """Hold the name until the block ends; what is yielded puts the server into the list.

    Start the server inside the block, so that the name is free again only when it has stopped.
    Raises `RecipeError` when one of that name runs already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    with lock_file(path.with_suffix(".lock")) as is_ours:
        if not is_ours:
            raise RecipeError(
                f"{name} is being served already",
                hint=f"forge ps shows it, forge stop {name} ends it",
            )

        def announce(served: Served) -> None:
            write_text(path, json.dumps(asdict(served)))

        path.unlink(missing_ok=True)  # of one that was killed
        try:
            yield announce
        finally:
            path.unlink(missing_ok=True)


def detach(directory: Path, name: str, command: Sequence[str], *, typed: str = "") -> Mapping[str, object]:
    """Start `command`, a `forge serve --json` that announces itself, and wait until it answers.

    `typed` is its standard input. Gives its first line. Raises the error that it ended with.
    """
    directory.mkdir(parents=True, exist_ok=True)
    running(directory)  # takes away the files of what has died
    if is_locked(directory / f"{name}.lock"):
        raise RecipeError(f"{name} is being served already", hint=f"forge stop {name} ends it")
    # Of this command only: another may be starting the same name, and loading takes minutes.
    out, log = (directory / f"{name}.{os.getpid()}.{kind}" for kind in ("out", "log"))
    server = process.start_detached(command, output=out, log=log, typed=typed)
    try:
        while not (line := _first_line(out)):
            if server.poll() is not None and not _first_line(out):
                raise StageError(f"forge serve ended with {server.poll()}", hint=f"its log is {log}")
            time.sleep(_SECONDS_BETWEEN)
    except BaseException:
        server.terminate()
        raise
    fields: dict[str, object] = json.loads(line)
    if isinstance(failure := fields.get("error"), dict):
        server.wait()
        for path in (out, log):
            path.unlink(missing_ok=True)
        raise error_from_json(failure)
    return fields


def _first_line(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    line, end, _ = text.partition("\n")
    return line if end else ""


def stop_servers(directory: Path, name: str | None = None) -> list[Served]:
    """Stop one, or all; give what was stopped. Raises `DataError` for a name that does not run."""
    listed = running(directory)
    chosen = [served for served in listed if name in (None, served.name)]
    if name is not None and not chosen:
        raise _not_running(directory, name, [served.name for served in listed])
    # All of them while their locks are held, so that the pids are their own: psutil signals no other program
    # that has one of them later, however long the first take to stop.
    paths = [directory / f"{served.name}.json" for served in chosen]
    processes = [_process_of(served, path) for served, path in zip(chosen, paths, strict=True)]
    for served, path, server in zip(chosen, paths, processes, strict=True):
        if server:
            with contextlib.suppress(psutil.NoSuchProcess):
                _end(server)
        if not is_locked(path.with_suffix(".lock")):
            _forget(path)
        # By now the next one of that name may hold the lock, and all but this record is its own.
        with contextlib.suppress(OSError, ValueError):
            if (left := _recorded(path)) and left.pid == served.pid:
                path.unlink(missing_ok=True)
    return chosen


def _not_running(directory: Path, name: str, names: Sequence[str]) -> DataError:
    lock = directory / f"{name}.lock"
    if not is_locked(lock):
        return DataError(f"{name} is not running", hint=f"running are: {', '.join(names) or 'none'}")
    if (directory / f"{name}.json").exists():
        return DataError(
            f"{name} cannot be stopped: its record does not name the process that serves it",
            hint=f"`lsof {lock}` shows that process: end it by its number",
        )
    return DataError(f"{name} is not running yet: it still loads", hint="forge ps lists it once it answers")


def _process_of(served: Served, path: Path) -> psutil.Process | None:
    """The process that the record at `path` names, if it has the lock open."""
    lock = path.with_suffix(".lock")
    with contextlib.suppress(psutil.Error, OSError, ValueError, OverflowError):
        server = psutil.Process(served.pid)
        if any(lock.samefile(opened.path) for opened in server.open_files()):
            return server
    return None


def _end(server: psutil.Process) -> None:
    """Ask it to stop, then make sure; back when it is gone, and its lock with it."""
    server.terminate()
    deadline = time.monotonic() + _SECONDS_TO_STOP
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            server.kill()
        time.sleep(_SECONDS_BETWEEN)
