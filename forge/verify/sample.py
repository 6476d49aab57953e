"""Which rows and positions are measured, and what so many of them can say.

Logits of every position of every row would not fit: a vocabulary of 150,000 takes 0.6 MB a position.
Rows and positions are drawn by seed, so that a measurement made again is the same one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.data.tokens import IGNORED
from forge.errors import DataError

Row = Mapping[str, Any]
"""`input_ids`, and `labels` where it is known which tokens are an answer's."""

ROWS = 64
TOKENS = 4096
"""At most so many tokens in all rows together: the activations of all are in memory at once."""
LONGEST = 512
_POSITIONS = 2048
_LOGITS = 2**26
"""At most so many logits (256 MiB in float32)."""


@dataclass(frozen=True)
class Sample:
    """Token ids of the rows (cut at `LONGEST`), and the positions whose logits are compared.

    `positions` are (row, index) in order; the next token is always there, for the perplexity.
    `answers` says of each position whether the next token belongs to an answer.
    """

    rows: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, int], ...]
    answers: tuple[bool, ...]
    given: int

    @property
    def follows(self) -> list[int]:
        return [self.rows[row][index + 1] for row, index in self.positions]

    def of_row(self, row: int) -> list[int]:
        return [index for number, index in self.positions if number == row]


def draw(
    rows: Sequence[Row], vocabulary: int, context: int | None, seed: int = 0, *, tokens: int = TOKENS
) -> Sample:
    """Draw rows of two tokens or more, spread over all, and positions in them; at most `tokens` in all rows.

    With fewer tokens the rows are the first of those with more.

    Raises `DataError` when there is no such row.
    """
    longest = min(LONGEST, context or LONGEST)
    usable = [
        (tuple(row["input_ids"][:longest]), row.get("labels")) for row in rows if len(row["input_ids"]) > 1
    ]
    if not usable:
        raise DataError("there is no row of two tokens or more to compare logits on", hint="give --data rows")
    chosen = random.Random(seed)
    order = chosen.sample(range(len(usable)), len(usable))
    kept: list[tuple[tuple[int, ...], Sequence[int] | None]] = []
    for number in order[:ROWS]:
        # A padded batch costs its longest row for each.
        width = max([len(usable[number][0]), *(len(ids) for ids, _ in kept)])
        if kept and width * (len(kept) + 1) > tokens:
            break
        kept.append(usable[number])
    every = [(row, index) for row, (ids, _) in enumerate(kept) for index in range(len(ids) - 1)]
    most = max(1, min(_POSITIONS, _LOGITS // vocabulary))
    positions = sorted(chosen.sample(every, min(most, len(every))))
    labels = [labels for _, labels in kept]
    answers = [(found := labels[row]) is None or found[at + 1] != IGNORED for row, at in positions]
    return Sample(tuple(ids for ids, _ in kept), tuple(positions), tuple(answers), len(rows))


def least_share(share: float, count: int) -> float:
    """The lower end of the 95 % interval of a share seen in `count` trials (Wilson)."""
    if not count:
        return 0.0
    z = 1.959964
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count))
