"""How far two sets of logits are apart. Runs in a worker; numpy in blocks, so that memory stays small.

NMSE: squared error over the reference's squared distance from its own mean at each position (a
constant added to all logits of a position changes no probability). KL: of the candidate's
distribution from the reference's, in nats. Top-1: share of positions with the same most likely
token. Perplexity: of the answers' tokens that really follow, where it is known which they are.

Rounding decides between experts of nearly equal weight, at some positions and by chance, and such a position
is another one then. Beside the means there is therefore what no few positions move: the middle one, or of
eight stretches of the rows the first quarter's end in the worst, where that is more. A fault in every
token's way, in all of a row or from some place on, moves one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from forge.verify.measurement import Excess, Leg, Legs, Stretch
from forge.verify.rounding import HALF_STEPS
from forge.verify.sample import Sample

LEAST_NMSE, LEAST_KL = 1e-7, 1e-7
"""What float32 sums in another order may leave: sound F32 files were at 1e-12 to 2e-11. GELU, which llama.cpp
looks up in a table of 16 bits, leaves 1e-7: that is in the type's own arithmetic."""
MOST_TIMES = 4.0
"""How many times as far as a type's own arithmetic a conversion may be: errors add up as squares, so this is
twice the distance. Sound ones were at 0.4 to 1.3 times."""
MOST_BEYOND_VENDOR = 1.2
"""How many times as far from f16 as llama.cpp's own a quantized file may be, in NMSE."""
FAR_NMSE = 1e-4
"""Where a position counts as another one: no 16-bit rounding of a dense model moved one so far."""
_BLOCK = 1 << 18
"""Logits at once: what is gone over ten times stays in the processor's cache."""
_BUCKETS = 32
_STRETCHES, _LEAST_OF_A_STRETCH = 8, 32


def compare(reference: Any, candidate: Any, sample: Sample) -> Leg:
    """Compare float32 logits of shape (positions, vocabulary), at the positions of `sample`.

    Where one vocabulary is padded, only the ids of both count.
    """
    import numpy as np

    follows = sample.follows
    common = min(reference.shape[1], candidate.shape[1])
    parts = [
        _block(
            np.asarray(reference[inside, :common], dtype=np.float64),
            np.asarray(candidate[inside, :common], dtype=np.float64),
            np.asarray(follows[inside]),
        )
        for inside in _blocks(len(follows), common)
    ]
    error, power, kl, same, loss, other = (np.concatenate(column) for column in zip(*parts, strict=True))
    counted, shares, stretches = _counted(sample), error / np.maximum(power, 1e-300), _stretches(sample)
    further = (other - loss)[counted]
    return Leg(
        positions=len(follows),
        nmse=float(error.sum() / max(power.sum(), 1e-300)),
        nmse_error=float(error.std() / math.sqrt(len(error)) / max(power.mean(), 1e-300)),
        nmse_middle=_middle(shares, stretches),
        beyond=float((shares > FAR_NMSE).mean()),
        kl_mean=float(kl.mean()),
        kl_middle=_middle(kl, stretches),
        kl_error=float(kl.std() / math.sqrt(len(kl))),
        kl_max=float(kl.max()),
        top1=float(same.mean()),
        perplexity_reference=float(np.exp(min(loss[counted].mean(), 50.0))),
        perplexity=float(np.exp(min(other[counted].mean(), 50.0))),
        loss_difference=float(further.mean()),
        loss_error=float(further.std() / math.sqrt(max(len(further) - 1, 1))),
        kl_by_position=_by_position(kl, [index for _, index in sample.positions]),
    )


@dataclass(frozen=True)
class Distances:
    """From a reference by position, squared: of a candidate `far`, of another `near`; the reference's power.

    All float64 arrays.
    """

    far: Any
    near: Any
    power: Any


def distances(reference: Any, candidate: Any, other: Any, sample: Sample) -> Distances:
    """How far `candidate` and `other` are from `reference` at the positions of `sample`."""
    import numpy as np

    common = min(logits.shape[1] for logits in (reference, candidate, other))
    parts: list[tuple[Any, Any, Any]] = []
    for inside in _blocks(len(sample.positions), common):
        centred, far, near = (
            _centred(np.asarray(logits[inside, :common], dtype=np.float64))
            for logits in (reference, candidate, other)
        )
        parts.append((_squares(far - centred), _squares(near - centred), _squares(centred)))
    far, near, power = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Distances(far, near, power)


def times_as_far(apart: Distances, sample: Sample) -> float:
    """How many times as far as the other is the candidate from the reference, by single positions' NMSE.

    Where rounding turns near ties in the one and not in the other, means say little: it is the middle
    position's ratio, or a stretch's, as `compare` has them. What no conversion leaves (a hundredth of
    `FAR_NMSE`) counts as no distance.
    """
    least = FAR_NMSE / 100 * apart.power + 1e-300
    return _middle(apart.far / (apart.near + least), _stretches(sample))


def excess(apart: Distances, times: float) -> Excess:
    """By how much the candidate is further from the reference than `times` as far as the other is.

    Errors of two files of one type go up and down together: their difference is known sooner than either.
    """
    difference, mean = apart.far - times * apart.near, max(float(apart.power.mean()), 1e-300)
    return Excess(
        float(difference.mean() / mean), float(difference.std() / math.sqrt(len(difference)) / mean)
    )


def losses(logits: Any, sample: Sample) -> Any:
    """Minus the log-probability (nats) of each token of an answer; of all where none is known as one."""
    import numpy as np

    follows, counted = np.asarray(sample.follows), _counted(sample)
    parts = [
        -_log_softmax(np.asarray(logits[inside], dtype=np.float64))[
            np.arange(len(follows[inside])), follows[inside]
        ]
        for inside in _blocks(len(follows), logits.shape[1])
    ]
    return np.concatenate(parts)[counted]


def _counted(sample: Sample) -> Any:
    """Which positions say how well answers are known."""
    import numpy as np

    return np.asarray(sample.answers) if any(sample.answers) else np.ones(len(sample.answers), dtype=bool)


def converts(leg: Leg, own: Leg | None) -> bool:
    """Whether two sets of logits are as near as a conversion leaves them.

    `own` is what the type's own arithmetic does to the same model (None where it is float32).
    """
    nmse, kl = (own.nmse, own.kl_mean) if own else (0.0, 0.0)
    return leg.nmse <= MOST_TIMES * nmse + LEAST_NMSE and leg.kl_mean <= MOST_TIMES * kl + LEAST_KL


def rounds_soundly(legs: Legs, kind: str) -> bool:
    """Whether the weights are what the type `kind` keeps of them, or what it takes does not show.

    Rounding alone takes half a step of any number in the type's range, however much that moves the logits.
    More is gone where numbers are beyond its range, or where tensors are coarser than the file says.
    """
    lost, leg = legs.most_lost, legs.rounded
    if lost is None or leg is None or lost.share <= HALF_STEPS[kind]:
        return True
    return converts(leg, legs.arithmetic)


def converts_mostly(leg: Leg, own: Leg | None) -> bool:
    """Whether at half of all positions they are, and at a quarter of those of every stretch of the rows.

    What a fault in every token's way never leaves; one at few tokens, or in few experts, may.
    """
    nmse, kl = (own.nmse_middle, own.kl_middle) if own else (0.0, 0.0)
    return leg.nmse_middle <= MOST_TIMES * nmse + LEAST_NMSE and leg.kl_middle <= MOST_TIMES * kl + LEAST_KL


def _blocks(positions: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // width)
    return (slice(at, at + step) for at in range(0, positions, step))


def _block(reference: Any, candidate: Any, follows: Any) -> tuple[Any, ...]:
    import numpy as np

    rows = np.arange(len(follows))
    best, other = reference.argmax(axis=1), candidate.argmax(axis=1)
    shift = candidate - reference
    common = shift.mean(axis=1)  # which changes no probability
    shift -= common[:, None]
    shares = np.exp(reference - reference[rows, best][:, None])
    total = shares.sum(axis=1)
    normal = np.log(total) + reference[rows, best]
    others = np.log(np.exp(candidate - candidate[rows, other][:, None]).sum(axis=1)) + candidate[rows, other]
    # The sum of p (log p - log q), of what both have in common taken out.
    kl = others - normal - common - np.einsum("ij,ij->i", shares, shift) / total
    return (
        _squares(shift),
        _squares(_centred(reference)),
        np.maximum(kl, 0.0),
        best == other,
        normal - reference[rows, follows],
        others - candidate[rows, follows],
    )


def _squares(values: Any) -> Any:
    import numpy as np

    return np.einsum("ij,ij->i", values, values)


def _centred(logits: Any) -> Any:
    return logits - logits.mean(axis=1, keepdims=True)


def _middle(values: Any, stretches: Sequence[Any]) -> float:
    """The middle of all positions' `values`, or the worst stretch's first quarter's end if that is more."""
    import numpy as np

    return float(max(np.median(values), *(np.quantile(values[stretch], 0.25) for stretch in stretches)))


def _stretches(sample: Sample) -> list[Any]:
    """The numbers of the positions by place in the row, in at most `_STRETCHES` of as many each.

    Those after the same tokens count once: a prompt that all rows share would turn as one.
    """
    import numpy as np

    places = sample.positions
    first: dict[tuple[int, ...], int] = {}
    for number, (row, index) in enumerate(places):
        first.setdefault(sample.rows[row][: index + 1], number)
    order = sorted(first.values(), key=lambda number: places[number][1])
    return np.array_split(order, max(1, min(_STRETCHES, len(order) // _LEAST_OF_A_STRETCH)))


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _by_position(kl: Any, places: Sequence[int]) -> tuple[Stretch, ...]:
    """Mean and greatest KL by place in the row, in at most `_BUCKETS` stretches of equal width."""
    import numpy as np

    where = np.asarray(places)
    width = int(where.max()) // _BUCKETS + 1
    stretches = []
    for start in range(0, int(where.max()) + 1, width):
        inside = kl[(where >= start) & (where < start + width)]
        if len(inside):
            stretches.append(Stretch(start, _short(inside.mean()), _short(inside.max())))
    return tuple(stretches)


def _short(value: Any) -> float:
    return float(f"{value:.3g}")


def top_log_probabilities(logits: Any, count: int) -> list[tuple[int, float]]:
    """The `count` most likely ids of one position, with their natural log-probabilities."""
    import numpy as np

    values = _log_softmax(np.asarray(logits, dtype=np.float64)[None])[0]
    best = np.argsort(-values, kind="stable")[:count]
    return [(int(number), round(float(values[number]), 6)) for number in best]


def divergence(logits: Any, other: Any) -> float:
    """The KL divergence (nats) of `other` from `logits`, both of one position."""
    import numpy as np

    p, q = (_log_softmax(np.asarray(values, dtype=np.float64)[None]) for values in (logits, other))
    return max(float((np.exp(p) * (p - q)).sum()), 0.0)
