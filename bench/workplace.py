"""A place to measure in: a directory and a store of its own, with the tools of the real store."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.measure import BenchmarkError, run
from forge.store.artifacts import open_store

_ROOT = Path(__file__).parent.parent
QUICKSTART = _ROOT / "templates" / "recipes" / "quickstart.yaml"


@dataclass(frozen=True)
class Workplace:
    """`directory` is where commands run and put their runs; `home` is their store; `more` of environment.

    `small`: where a benchmark has a small form, which shows that it runs, measure that.
    """

    directory: Path
    home: Path
    more: Mapping[str, str] = field(default_factory=dict)
    small: bool = False

    @property
    def environment(self) -> Mapping[str, str]:
        # Nothing may wait for the network. What pip installs has its bytecode: so has what runs here.
        settings = {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": ""}
        return {"FORGE_HOME": str(self.home), **settings, **self.more}


@contextmanager
def workplace(*, small: bool = False) -> Iterator[Workplace]:
    """An empty one, removed afterwards; raises `BenchmarkError` where `forge setup` has not run."""
    tools = open_store(read_only=True).root / "tools"
    if not tools.is_dir():
        raise BenchmarkError(f"there is no {tools}: run make setup, or forge setup, first")
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as scratch:
        place = Workplace(Path(scratch) / "here", Path(scratch) / "home", small=small)
        place.directory.mkdir()
        place.home.mkdir()
        (place.home / "tools").symlink_to(tools)
        yield place


def random_model(place: Workplace, size: str, tokenizer: Path | None = None) -> tuple[Path, int]:
    """A directory with the `base` and the `adapter` of `bench.random_model`, and the base's parameters.

    Made by a program of its own, which needs torch: this one stays small.
    """
    directory = place.directory / size
    command = [sys.executable, "-m", "bench.random_model", str(directory), size]
    command += [str(tokenizer)] if tokenizer else []
    downloads = {"FORGE_TESTS_HOME": str((place.home / "tools").resolve().parent)}
    made = run(command, directory=_ROOT, environment={**place.environment, **downloads})
    return directory, json.loads(made.output.splitlines()[-1])["parameters"]
