"""How long a person waits for the commands that compute nothing: `forge --help` and `forge plan`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.measure import FORGE, Outcome, best_of, run
from bench.workplace import QUICKSTART, Workplace

HELP_SECONDS = 0.150
PLAN_SECONDS = 1.0
REPEATS = 5


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Best of five each; `pairs` has no say here. The plan is that of an empty store."""
    yield _best("forge --help", ["--help"], HELP_SECONDS, place)
    yield _best("forge plan, nothing made", ["plan", QUICKSTART], PLAN_SECONDS, place)


def _best(name: str, arguments: list[str | Path], limit: float, place: Workplace) -> Outcome:
    command = [FORGE, *map(str, arguments)]
    once = partial(run, command, directory=place.directory, environment=place.environment)
    value, samples = best_of(REPEATS, once)
    return Outcome(name, value, "s", limit, samples, f"best of {REPEATS}")
