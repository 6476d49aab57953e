"""Whether enough positions were compared: pure, from the legs of a measurement.

Positions are compared in looks, each larger than the one before, until every gate is decided: its figure is
further from its limit than chance explains. A mixture of experts takes the largest look, since near ties that
rounding turned say little of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from forge.verify.compare import LEAST_KL, LEAST_NMSE, MOST_TIMES
from forge.verify.measurement import Legs

_ERRORS = 3.0
"""Standard errors on either side of a limit: 99.7 % for each gate."""


def undecided(legs: Legs, experts: int, max_kl: float | None, min_top1: float | None) -> tuple[str, ...]:
    """The gates whose limit is within what chance explains of the figure."""
    return tuple(_undecided(legs, experts, max_kl, min_top1))


def _undecided(legs: Legs, experts: int, max_kl: float | None, min_top1: float | None) -> Iterator[str]:
    if experts > 1:
        yield "near ties between experts"
    leg, own = legs.conversion, legs.arithmetic
    nmse, kl = (own.nmse, own.kl_mean) if own else (0.0, 0.0)
    errors = (own.nmse_error, own.kl_error) if own else (0.0, 0.0)
    nmse_error = math.hypot(leg.nmse_error, MOST_TIMES * errors[0])
    kl_error = math.hypot(leg.kl_error, MOST_TIMES * errors[1])
    if is_near(leg.nmse, nmse_error, MOST_TIMES * nmse + LEAST_NMSE):
        yield "the conversion's NMSE"
    if is_near(leg.kl_mean, kl_error, MOST_TIMES * kl + LEAST_KL):
        yield "the conversion's KL"
    if legs.beyond is not None and is_near(legs.beyond.mean, legs.beyond.error, 0.0):
        yield "the quantized file beside llama.cpp's own"
    if legs.trained is not None:
        worse, error = -legs.trained.loss_difference, legs.trained.loss_error
        if 0.5 * _ERRORS * error < worse < _ERRORS * error:
            yield "whether answers are worse than as trained"
    if max_kl is not None and is_near(legs.file.kl_mean, legs.file.kl_error, max_kl):
        yield "verify.max_kl"
    share = legs.file.top1
    if min_top1 is not None:
        error = math.sqrt(max(share * (1 - share), 1 / legs.file.positions) / legs.file.positions)
        if is_near(share, error, min_top1):
            yield "verify.min_top1"


def is_near(value: float, error: float, limit: float) -> bool:
    """Whether chance explains that `value`, known with the standard error `error`, is not the limit."""
    return abs(value - limit) <= _ERRORS * error
