"""Mutants and what becomes of them: each is put into a copy of the tree, and its few tests are run there.

A test run is a fork of one process that has the heavy libraries in memory, which is most of what a start
costs; neither `forge` nor `tests` are imported before the fork.
"""

from __future__ import annotations

import compileall
import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mutants.mutations import Mutation

ROOT = Path(__file__).parent.parent.parent
_HEAVY = ("torch", "transformers", "peft", "safetensors.torch", "pydantic", "httpx", "jinja2")
_COPIED = ("forge", "tests")
_MARKS = "not slow and not docker and not gpu and not ollama"
_GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Outcome:
    """`by` is the test that failed, or what else stopped the mutant; nothing where it survived.

    `seconds` are those of a core.
    """

    mutation: Mutation
    by: str
    seconds: float


@dataclass(frozen=True)
class _Tested:
    status: int
    seconds: float
    output: str

    @property
    def killer(self) -> str:
        if self.status == 0:
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", self.output, re.MULTILINE)
        return failed[1] if failed else "no end" if self.status == -signal.SIGKILL else "no start"


class Tree:
    """A copy of the tree, of which one file at a time is a mutant."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sound: dict[tuple[str, ...], float] = {}

    def baseline(self, tests: Sequence[str]) -> float:
        """Seconds of these tests without a fault; they must pass."""
        if (known := self._sound.get(tuple(tests))) is not None:
            return known
        tested = self._test(tests, 600)
        if tested.killer:
            raise SystemExit(f"without a mutation, {' '.join(tests)} does not pass:\n{tested.output}")
        return self._sound.setdefault(tuple(tests), tested.seconds)

    def outcome(self, mutation: Mutation, tests: Sequence[str]) -> Outcome:
        limit = _GRACE_SECONDS + 8 * self.baseline(tests)
        path = self._directory / mutation.path
        source = path.read_bytes()
        # Bytecode counts as that of a source of the same size and second.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        path.write_bytes(mutation.applied(source))
        try:
            tested = self._test(tests, limit)
        finally:
            path.write_bytes(source)
        return Outcome(mutation, tested.killer, tested.seconds)

    def _test(self, tests: Sequence[str], limit: float) -> _Tested:
        started = time.monotonic()
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                self._become_pytest(tests, output.fileno())
            status, seconds = _wait(child, started + limit)
            output.seek(0)
            text = output.read().decode(errors="replace")
        return _Tested(status, seconds, text)

    def _become_pytest(self, tests: Sequence[str], output: int) -> None:
        os.setsid()
        for stream in (1, 2):
            os.dup2(output, stream)
        for name in list(sys.modules):
            if name.partition(".")[0] in _COPIED:
                del sys.modules[name]
        os.chdir(self._directory)
        sys.path.insert(0, str(self._directory))
        os.environ["PYTHONPATH"] = str(self._directory)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # some are in memory, which pytest warns of
        plugins = ["-p", "no:cacheprovider", "-p", "pytest_timeout"]
        arguments = ["-x", "-q", *plugins, "-m", _MARKS, *(f"tests/{name}" for name in tests)]
        os._exit(pytest.main(arguments))


def _wait(child: int, until: float) -> tuple[int, float]:
    """Its exit code, that of a kill where its time is up, and the seconds of a core that it took.

    A kill takes all that it started along.
    """
    ended = 0
    while not ended and time.monotonic() < until:
        time.sleep(0.02)
        ended, status, used = os.wait4(child, os.WNOHANG)
    if not ended:
        os.killpg(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


@contextlib.contextmanager
def copied_tree() -> Iterator[Tree]:
    """A tree for mutants; what is not copied is linked to."""
    for name in _HEAVY:
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ.setdefault("FORGE_HOME", str(ROOT / ".forge"))
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        directory = Path(scratch)
        for path in ROOT.iterdir():
            if path.name not in _COPIED and not path.name.startswith("."):
                (directory / path.name).symlink_to(path)
        for name in _COPIED:
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(directory / "forge", quiet=1)
        yield Tree(directory)
