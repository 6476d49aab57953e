"""Where two prompts, or their token ids, part."""

from __future__ import annotations

from collections.abc import Sequence

from forge.errors import Problem


def first_difference(expected: Sequence[object], other: Sequence[object]) -> int:
    """The index of the first place that differs; the shorter's length where it begins the longer."""
    pairs = enumerate(zip(expected, other, strict=False))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(expected), len(other)))


def difference_of(expected: Sequence[object], other: Sequence[object], place: str) -> list[Problem]:
    """The first difference with what stands around it: what training had, and what `place` has."""
    start = max(0, first_difference(expected, other) - 30)
    here = slice(start, start + 70)
    return [Problem(repr(expected[here]), "trained on"), Problem(repr(other[here]), place)]
