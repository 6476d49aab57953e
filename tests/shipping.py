"""Real ships for the tests, a plugin: the command as a program of its own, in a place of its own.

`Workshop.forge` runs a command to its end, `Workshop.start` leaves it running. Places that share a
store (`Workshop.beside`) find each other's artifacts but have runs of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.process import Child
from tests.conftest import link_converters
from tests.json_fields import check_fields

# Small in every way: two dozen rows, four steps, no claim that anything was learned.
RECIPE: Mapping[str, Any] = {
    "name": "mini",
    "base": "builtin:tiny",
    "data": {
        "source": "builtin:yoda",
        "columns": {"prompt": "sentence", "completion": "translation_extra"},
        "limit": 24,
        "eval": 4,
    },
    "train": {"method": "qlora", "max_steps": 4, "batch_size": 4, "learning_rate": 1e-3},
    "verify": {"learned": "off"},
    "smoke": [{"prompt": "There is bacon in this sandwich.", "max_tokens": 24}],
}
PURE = ("data", "train", "validate", "evaluate", "export", "modelfile", "verify")
STAGES = (*PURE, "deploy", "smoke")


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code, its JSON, what it said."""

    code: int
    fields: dict[str, Any]
    said: str

    @property
    def cached(self) -> dict[str, bool]:
        return {stage["name"]: stage["cached"] for stage in self.fields["stages"]}


@dataclass(frozen=True)
class Workshop:
    """A working directory and a store."""

    directory: Path
    home: Path

    @property
    def command(self) -> list[str]:
        """What starts forge."""
        return [sys.executable, "-m", "forge"]

    def beside(self, name: str) -> Workshop:
        """Another directory with the same store."""
        directory = self.directory.parent / name
        directory.mkdir()
        return Workshop(directory, self.home)

    @property
    def run(self) -> Path:
        return self.directory / "runs" / "mini"

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "manifest.json").read_text(encoding="utf-8"))
        return found

    def recipe(self, **changes: Any) -> None:
        """Write recipe.yaml: `RECIPE` with sections, or fields of them, replaced; None leaves one out."""
        merged = dict(RECIPE)
        for name, value in changes.items():
            before = merged.get(name)
            together = isinstance(before, Mapping) and isinstance(value, Mapping)
            merged[name] = {**before, **value} if together and before is not None else value
        kept = {name: value for name, value in merged.items() if value is not None}
        text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in kept.items())  # JSON is YAML
        (self.directory / "recipe.yaml").write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def start(self, *arguments: str) -> Iterator[Child]:
        """A command that runs; its standard error is in `errors.txt`. Stopped when the block ends."""
        command = [*self.command, *arguments]
        with (self.directory / "errors.txt").open("w") as errors:
            environment = {"FORGE_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}
            with Child(
                command, log=errors, directory=self.directory, environment=environment, separate_errors=True
            ) as child:
                yield child

    def forge(self, *arguments: str, typed: str = "") -> Answer:
        """Run a command with `--json`; no traceback may show. `typed` is what a person types."""
        with self.start(*arguments, "--json") as child:
            child.send(typed)
            answer = self.heard(child)
        check_fields(arguments, answer.fields)
        return answer

    def heard(self, child: Child) -> Answer:
        """Hear a command out."""
        lines = list(child.lines())
        code = child.wait()
        said = (self.directory / "errors.txt").read_text(encoding="utf-8")
        assert "Traceback" not in said, said
        assert lines, said
        return Answer(code, json.loads(lines[-1]), said)

    def ship(self, *arguments: str, code: int = 0) -> Answer:
        answer = self.forge("ship", "recipe.yaml", *arguments)
        assert answer.code == code, answer.said
        return answer

    def stage_directories(self, stage: str) -> list[Path]:
        return sorted((self.home / "artifacts" / stage).glob("*"))


def wait_for(what: str, condition: Callable[[], object], child: Child, seconds: float = 240) -> None:
    """Wait until `condition` holds, while `child` runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.status is None, f"it ended with {child.status} before {what}"
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.01)


def family(child: Child) -> list[int]:
    """The pids of a running command and of all that it started."""
    return [child.pid, *(one.pid for one in psutil.Process(child.pid).children(recursive=True))]


def processes_of(home: Path) -> list[psutil.Process]:
    """Every process on this machine that uses the store `home`, but what renders this process's templates."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            renders_here = "forge.chat.render_process" in one.cmdline() and one.ppid() == os.getpid()
            if one.pid != os.getpid() and one.environ().get("FORGE_HOME") == str(home) and not renders_here:
                found.append(one)
    return found


@pytest.fixture(scope="module")
def ship_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store for the ships of a module, which leave nothing running."""
    home = link_converters(tmp_path_factory.mktemp("store") / "home")
    yield home
    assert processes_of(home) == [], "something of the ships is still running"


@pytest.fixture
def workshop(ship_store: Path, tmp_path: Path) -> Workshop:
    """A directory of the test's own, with the store of its module."""
    directory = tmp_path / "here"
    directory.mkdir()
    return Workshop(directory, ship_store)
