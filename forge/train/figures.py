"""What *evaluate* and *smoke* found of the held-out rows: made by the stages, read back from a manifest.

Classes only, so that reading a run loads nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """A figure of the base and of the tuned model."""

    before: float
    after: float


@dataclass(frozen=True)
class HeldoutAnswer:
    """A held-out question, the answer that its row has, and those of the base and of the tuned model."""

    messages: tuple[Mapping[str, Any], ...]
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Exact:
    """Of the rows with short answers: how many were given to the letter before and after."""

    rows: int
    before: int
    after: int
    answers: tuple[HeldoutAnswer, ...]


@dataclass(frozen=True)
class ServedAnswer(HeldoutAnswer):
    """A held-out row with the answer that the server gave to it."""

    served: str
    finish_reason: str


@dataclass(frozen=True)
class Heldout:
    """The held-out rows: how many the server answered to the letter, and how many answers ended."""

    rows: int
    exact: int
    stopped: int
    answers: tuple[ServedAnswer, ...]
