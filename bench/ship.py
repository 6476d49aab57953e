"""The quickstart from an empty store, and the same ship again when everything is already made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.measure import FORGE, BenchmarkError, Outcome, Run, best_of, run
from bench.workplace import QUICKSTART, Workplace

WHOLE_SECONDS = 480.0
CACHED_SECONDS = 2.0
PLAN_SECONDS = 1.0
REPEATS = 5
NO_DEPLOY = ("-o", "deploy.runtime=none")


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """The whole ship once, then best of five; `pairs` has no say here.

    Raises `BenchmarkError` when a ship that is to be cached makes anything.
    """
    whole = _forge(place, "ship")
    yield Outcome(
        "forge ship quickstart, from nothing", whole.seconds, "s", WHOLE_SECONDS, note=_stages(whole)
    )
    cached = partial(_cached, place)
    value, samples = best_of(REPEATS, cached)
    yield Outcome(
        "forge ship, all cached, no deploy", value, "s", CACHED_SECONDS, samples, f"best of {REPEATS}"
    )
    value, samples = best_of(REPEATS, partial(_forge, place, "plan"))
    yield Outcome("forge plan, all cached", value, "s", PLAN_SECONDS, samples, f"best of {REPEATS}")


def _forge(place: Workplace, command: str, *options: str) -> Run:
    line = [FORGE, command, str(QUICKSTART), *options, "--json"]
    return run(line, directory=place.directory, environment=place.environment)


def _cached(place: Workplace) -> Run:
    done = _forge(place, "ship", *NO_DEPLOY)
    made = [stage["name"] for stage in _fields(done) if not stage["cached"]]
    if made:
        raise BenchmarkError(f"a ship that was to find everything made {', '.join(made)}")
    return done


def _stages(whole: Run) -> str:
    return ", ".join(f"{stage['name']} {stage['seconds']:.0f} s" for stage in _fields(whole))


def _fields(done: Run) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = json.loads(done.output.splitlines()[-1])["stages"]
    return stages
