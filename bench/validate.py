"""What `forge validate` takes for an adapter of a model of 7 billion parameters: seconds, and memory.

The base has no weights that matter: its files are sparse, of the size that they would have. The
adapter is whole, of rank 16 on every linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.measure import FORGE, Outcome, peak_of
from bench.workplace import Workplace, random_model

SECONDS = 60.0
GIGABYTES = 0.5


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Once: a limit of so many times the usual import of torch needs no repetition."""
    model, _ = random_model(place, "7B")
    base, adapter = str(model / "base"), str(model / "adapter")
    command = [FORGE, "validate", "--base", base, "--adapter", adapter, "--json"]
    peak, seconds = peak_of(command, directory=place.directory, environment=place.environment)
    yield Outcome("forge validate, 7 billion: seconds", seconds, "s", SECONDS)
    yield Outcome("forge validate, 7 billion: memory", peak / 1e9, "GB", GIGABYTES)
