"""Where two prompts, or their token ids, part."""

from __future__ import annotations

from collections.abc import Sequence


def first_difference(expected: Sequence[object], other: Sequence[object]) -> int:
    """The index of the first place that differs; the shorter's length where it begins the longer."""
    pairs = enumerate(zip(expected, other, strict=False))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(expected), len(other)))
