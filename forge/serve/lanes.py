"""Endpoints side by side: how many requests each gets, and which gets the next."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from forge.errors import ForgeError
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint

# For servers that do not say how many slots they have.
DEFAULT_CONCURRENCY = 4


def slots_of(endpoint: Endpoint) -> int:
    """How many requests llama-server says it answers at once."""
    with contextlib.suppress(ForgeError, ValueError, TypeError, KeyError):
        with Client(endpoint) as client:
            return max(1, int(client.properties()["total_slots"]))
    return DEFAULT_CONCURRENCY


@dataclass(eq=False)
class Lane:
    """One endpoint. Its pace is halved when it is busy or away, and slowly rises when it answers."""

    endpoint: Endpoint
    most: int
    pace: float = field(init=False)
    running: int = 0
    answered_at: float = -math.inf

    def __post_init__(self) -> None:
        self.pace = float(self.most)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def busy(self) -> None:
        self.pace = max(1.0, self.pace / 2)

    def answered(self) -> None:
        self.pace = min(float(self.most), self.pace + 1 / self.pace)
        self.answered_at = time.monotonic()


def freest(lanes: Sequence[Lane]) -> Lane:
    """The lane with the most room."""
    return max(lanes, key=lambda lane: lane.pace - lane.running)
