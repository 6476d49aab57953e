"""The only user of `subprocess`: every program that forge starts is started here.

A child is logged as a line that can be pasted into a shell, runs in a session of its own (so
that Ctrl-C reaches only forge, which then ends its children in order), dies with its parent, and
is stopped by wait, SIGTERM, SIGKILL. On Linux the kernel kills it when the parent dies
(PR_SET_PDEATHSIG); Python children also watch the pipe they inherit (`exit_with_parent`), which
works everywhere. Only `start_detached` starts what outlives us.

Not covered: a program that is not ours outlives a killed parent on macOS, and what such a program
starts itself outlives one everywhere.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from forge.errors import MissingToolError

GRACE_SECONDS = 20.0
_WAITING = frozenset({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"})
_SPIN_COUNT = "1000"
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_MACHINE = Path("/proc/vmstat")

# Sets PR_SET_PDEATHSIG (1) to SIGKILL, then becomes the program. A launcher instead of
# `preexec_fn`, which can deadlock when another thread holds a lock across the fork. If the parent
# died before prctl ran, getppid already differs.
_LAUNCHER = (
    "import ctypes,os,sys;"
    "ctypes.CDLL(None).prctl(1,9);"
    "os.getppid()==int(sys.argv[1]) or os._exit(1);"
    "os.execvp(sys.argv[2],sys.argv[2:])"
)


def pasteable(command: Sequence[str], directory: Path | None = None) -> str:
    """The command as one line for a shell."""
    line = shlex.join(command)
    return f"(cd {shlex.quote(str(directory))} && {line})" if directory else line


def waiting_policy(environment: Mapping[str, str]) -> dict[str, str]:
    """How threads of a child wait for each other: not by turning for long, which starves who has the core.

    libgomp reads it when it is loaded, and by default turns for as long as there are no more threads than
    cores; with another busy process on each core a token then takes seconds. A setting of the user's own in
    `environment` stays.
    """
    if _WAITING.isdisjoint(environment):
        return {"GOMP_SPINCOUNT": _SPIN_COUNT}
    return {}


def cpu_share(environment: Mapping[str, str], control_group: Path = _CONTROL_GROUP) -> dict[str, str]:
    """Threads for a child in a container that has a share of the cores: libraries count all of them.

    Nothing where there is no such share, or where the user says how many in `environment`.
    """
    if "OMP_NUM_THREADS" in environment or not hasattr(os, "sched_getaffinity"):
        return {}
    try:
        quota, period = map(int, (control_group / "cpu.max").read_text(encoding="utf-8").split())
    except (OSError, ValueError):  # no control group, or the word "max"
        return {}
    share = -(-quota // period)
    return {"OMP_NUM_THREADS": str(share)} if share < len(os.sched_getaffinity(0)) else {}


def kills_for_memory() -> int | None:
    """How many processes the system has killed for lack of memory: in this container, else on this machine.

    None where it does not say (macOS). The kernel's log is often closed to users; these counts are not.
    """
    for counts in (_CONTROL_GROUP / "memory.events", _MACHINE):
        with contextlib.suppress(OSError):
            for line in counts.read_text(encoding="utf-8").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return None


@dataclass(frozen=True)
class Finished:
    """What a program that ended left: its exit status (negative: the signal) and its output."""

    status: int
    output: str


class Child:
    """A running program. Use it as a context manager: leaving the block stops it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: IO[str] | None = None,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
        separate_errors: bool = False,
    ) -> None:
        """Start `command`. Call from the main thread: the kernel's parent is a *thread*.

        `environment` is added to ours. With `separate_errors` standard error goes only to `log`
        and standard output stays a clean channel; otherwise both come out of `lines`.
        Raises `MissingToolError` when there is no such program.
        """
        self.command = list(command)
        self.log = log
        combined = {**os.environ, **(environment or {})}
        combined |= waiting_policy(combined) | cpu_share(combined)
        program = self.command[0]
        place = (directory or Path()) / program if os.sep in program else program
        if shutil.which(place, path=combined.get("PATH")) is None:
            raise MissingToolError(f"there is no program {program}", hint="install it, or fix the PATH")
        if log:
            log.write(f"$ {pasteable(command, directory)}\n")
            log.flush()
        launch = self.command
        if sys.platform == "linux":
            launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *self.command]
        errors: int | IO[str] = subprocess.STDOUT
        if separate_errors:
            errors = log if log else subprocess.DEVNULL
        self._process = subprocess.Popen(
            launch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=directory,
            env=combined,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.poll()

    def send(self, text: str) -> None:
        """Write to its standard input, which stays open: its end means that we died."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(text)
            self._process.stdin.flush()

    def lines(self) -> Iterator[str]:
        """Its output, line by line as it comes, without line ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield line.rstrip("\n")

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and give its status; read its `lines` before, or it may wait for us."""
        return self._process.wait(timeout)

    def terminate(self) -> None:
        """Ask it to stop; `stop` makes sure."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to its whole session, at once."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self, grace: float = GRACE_SECONDS) -> int:
        """SIGTERM, wait, then SIGKILL. A second Ctrl-C while it waits kills at once."""
        try:
            if self._process.poll() is None:
                self.terminate()
                self.ends_within(grace)
        finally:
            self.kill()
            for stream in (self._process.stdin, self._process.stdout):
                if stream:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        return self._process.wait()

    def ends_within(self, seconds: float) -> bool:
        """Wait for it to end by itself, no longer than `seconds`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run(
    command: Sequence[str],
    *,
    log: IO[str] | None = None,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Finished:
    """Run a program to its end; its output goes to `log`, to `on_line`, and is returned."""
    kept: list[str] = []
    with Child(command, log=log, directory=directory, environment=environment) as child:
        for line in child.lines():
            kept.append(line)
            if log:
                log.write(line + "\n")
            if on_line:
                on_line(line)
        return Finished(child.wait(), "\n".join(kept))


def start_detached(
    command: Sequence[str], *, output: Path, log: Path, typed: str = ""
) -> subprocess.Popen[str]:
    """Start a program that outlives us, in a session of its own; what it says goes to two files.

    `typed` is all of its standard input: a pipe, so that what is secret shows in no list and no file.
    """
    with output.open("w", encoding="utf-8") as out, log.open("w", encoding="utf-8") as errors:
        errors.write(f"$ {pasteable(command)}\n")
        errors.flush()
        started = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
    assert started.stdin is not None
    # It may have ended without reading; its log says why.
    with contextlib.suppress(BrokenPipeError), started.stdin:
        started.stdin.write(typed)
    return started


def exit_with_parent(stream: IO[str]) -> None:
    """In a child: end this process when `stream`, the pipe from the parent, ends."""

    def watch() -> None:
        while stream.readline():
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="exit-with-parent").start()


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that one clean-up path serves both."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
