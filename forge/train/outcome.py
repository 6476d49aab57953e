"""What the figures of a training run mean, in words: nothing learned, far from an answer, still falling.

Pure functions of losses in nats a token; no torch. Not covered: whether the answers are good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_FAR = 0.5
"""The share of guessing's loss from which a model is far from answering: perplexity 222 of 49,152 tokens."""
_LEAST_FALL = 0.02
_LEAST_STEPS = 16
_STANDARD_ERRORS = 2.0
_BY_HEART = 0.7
"""Below this share of the held-out loss a training loss falls because rows are learned by heart."""


def is_guessing(loss: float, vocabulary: int) -> bool:
    """Whether `loss` is no better than that of giving each token of the vocabulary the same chance."""
    return vocabulary > 1 and loss >= math.log(vocabulary)


def is_far(loss: float, vocabulary: int) -> bool:
    """Whether a model with `loss` is better than guessing, but far from answering."""
    return vocabulary > 1 and _FAR * math.log(vocabulary) <= loss < math.log(vocabulary)


def still_falling(evaluations: Sequence[float]) -> bool:
    """Whether the last of the held-out losses measured while it trained is the best by a good part."""
    if len(evaluations) < 2:
        return False
    return evaluations[-1] < min(evaluations[:-1]) * (1 - _LEAST_FALL)


def fall_at_the_end(losses: Sequence[float], heldout: float) -> tuple[float, float] | None:
    """The mean training losses of the third and the last quarter of the steps, where they still fell.

    None where they fell by no more than steps differ among themselves, or below what is learned by heart.
    """
    if len(losses) < _LEAST_STEPS:
        return None
    quarter = len(losses) // 4
    before, last = losses[-2 * quarter : -quarter], losses[-quarter:]
    was, now = sum(before) / quarter, sum(last) / quarter
    spread = sum((loss - was) ** 2 for loss in before) + sum((loss - now) ** 2 for loss in last)
    error = math.sqrt(2 * spread / (2 * quarter - 2) / quarter)
    falls = was - now > max(_STANDARD_ERRORS * error, _LEAST_FALL * was)
    return (was, now) if falls and now > _BY_HEART * heldout else None
