"""How things are timed: one program at a time, from its start to its end, with its peak memory.

What is compared with the usual way runs in interleaved pairs, so that a machine that slows down or
speeds up meets both alike, and the median of the pairs' ratios counts. What is held against a
limit in seconds counts with its best time, which is the one least disturbed by other work.

Not covered: parts of a program, and anything inside this process.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")

FORGE = str(Path(sys.executable).with_name("forge"))


class BenchmarkError(Exception):
    """A program that was to be measured failed, or did not do what it was measured for."""


@dataclass(frozen=True)
class Run:
    """One program that ended well, with its children.

    Wall seconds, processor seconds (which other work on the machine hardly changes), the peak
    memory of the largest process, and standard output. Linux carries the peak of this process over
    to a program that it starts, so nothing smaller than the measuring process is seen: keep it small.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    output: str


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found; `limit` is None for a figure that is only told. `unit` is s, x or nothing.

    `value` is None for what this machine cannot measure; `note` says why.
    """

    name: str
    value: float | None
    unit: str
    limit: float | None = None
    samples: Sequence[float] = ()
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.limit is None or self.value is None or self.value <= self.limit


def run(command: Sequence[str], *, directory: Path, environment: Mapping[str, str] | None = None) -> Run:
    """Run `command` to its end and measure it.

    `environment` is added to ours. Raises `BenchmarkError` with the end of its output when its
    exit status is not 0.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )
        usage = _wait(child)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            said = (errors.read() + output.read()).strip().splitlines()[-20:]
            raise BenchmarkError("\n".join([f"status {child.returncode}: {' '.join(command)}", *said]))
        return Run(seconds, usage.ru_utime + usage.ru_stime, _in_bytes(usage.ru_maxrss), output.read())


def _wait(child: subprocess.Popen[bytes]) -> resource.struct_rusage:
    """Wait for the end; what the kernel counted for the child and for those that it waited for."""
    try:
        _, waited, usage = os.wait4(child.pid, 0)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    child.returncode = os.waitstatus_to_exitcode(waited)
    return usage


def _in_bytes(peak: int) -> int:
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def peak_of(
    command: Sequence[str], *, directory: Path, environment: Mapping[str, str] | None = None
) -> tuple[int, float]:
    """The most anonymous memory of a command and its children together, in bytes, and its seconds.

    Linux alone tells it. Raises `BenchmarkError` with the end of its errors when it fails, and where
    nothing could be measured.
    """
    with tempfile.TemporaryFile("w+") as errors:
        started, most = time.monotonic(), 0
        child = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            while child.poll() is None:
                most = max(most, _anonymous(child.pid))
                time.sleep(0.05)
        finally:
            child.terminate()
            child.wait()
        if child.returncode:
            errors.seek(0)
            raise BenchmarkError(errors.read()[-2000:])
        if not most:
            raise BenchmarkError(f"nothing was seen of the memory of {' '.join(command)}: is this Linux?")
        return most, time.monotonic() - started


def _anonymous(pid: int) -> int:
    """Anonymous memory of a process and all below it, in bytes (Linux)."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for one in family:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
        except OSError:
            continue  # it has just ended
        lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon:")]
        total += sum(int(words[1]) * 1024 for words in lines)
    return total


def best_of(count: int, measure: Callable[[], Run]) -> tuple[float, list[float]]:
    """The shortest of `count` times in seconds, after one that does not count; and all of them."""
    measure()
    seconds = [measure().seconds for _ in range(count)]
    return min(seconds), seconds


def interleaved(count: int, ours: Callable[[], T], usual: Callable[[], T]) -> list[tuple[T, T]]:
    """`count` times (ours, usual), one right after the other; which of them goes first alternates."""
    pairs: list[tuple[T, T]] = []
    for number in range(count):
        print(f"  pair {number + 1} of {count}", flush=True)
        if number % 2:
            second = usual()
            pairs.append((ours(), second))
        else:
            pairs.append((ours(), usual()))
    return pairs


def median_ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, list[float]]:
    """The median of the pairs' ratios, ours over the usual way; and all of them."""
    ratios = [ours / usual for ours, usual in pairs]
    return statistics.median(ratios), ratios
