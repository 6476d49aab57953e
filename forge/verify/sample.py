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
from forge.verify.measurement import Positions

Row = Mapping[str, Any]
"""`input_ids`, and `labels` where it is known which tokens are an answer's."""

ROWS = 64
TOKENS = 4096
"""At most so many tokens in all rows together: the activations of all are in memory at once."""
LONGEST = 512
SEED = 0
FIRST_ROWS = 100
"""Of so many rows the prompts are compared; those whose logits are compared are drawn from all."""
_POSITIONS = 2048
_LOGITS = 2**26
"""At most so many logits (256 MiB in float32)."""


@dataclass(frozen=True)
class Sample:
    """Token ids of the rows (cut at `LONGEST`), and the positions whose logits are compared.

    `positions` are (row, index) in order; the next token is always there, for the perplexity.
    `answers` says of each position whether the next token belongs to an answer; `numbers` are the rows' own
    among all.
    """

    rows: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, int], ...]
    answers: tuple[bool, ...]
    offered: int
    numbers: tuple[int, ...] = ()

    @property
    def positions_in(self) -> Positions:
        """The positions in the rows as they were given."""
        return Positions(self.numbers, tuple(tuple(self.of_row(row)) for row in range(len(self.rows))))

    @property
    def follows(self) -> list[int]:
        return [self.rows[row][index + 1] for row, index in self.positions]

    def of_row(self, row: int) -> list[int]:
        return [index for number, index in self.positions if number == row]


def draw(
    rows: Sequence[Row], vocabulary: int, context: int | None, seed: int = SEED, *, tokens: int = TOKENS
) -> Sample:
    """Draw rows of two tokens or more, spread over all, and positions in them; at most `tokens` in all rows.

    With fewer tokens the rows are the first of those with more.

    Raises `DataError` when there is no such row.
    """
    longest = min(LONGEST, context or LONGEST)
    usable = [number for number, row in enumerate(rows) if len(row["input_ids"]) > 1]
    if not usable:
        raise DataError("there is no row of two tokens or more to compare logits on", hint="give --data rows")
    chosen = random.Random(seed)
    kept: list[int] = []
    width = 0
    for number in chosen.sample(usable, len(usable))[:ROWS]:
        # A padded batch costs its longest row for each.
        width = max(width, min(longest, len(rows[number]["input_ids"])))
        if kept and width * (len(kept) + 1) > tokens:
            break
        kept.append(number)
    cut = [tuple(rows[number]["input_ids"][:longest]) for number in kept]
    every = [(row, index) for row, ids in enumerate(cut) for index in range(len(ids) - 1)]
    most = max(1, min(_POSITIONS, _LOGITS // vocabulary))
    return _sample(rows, kept, cut, sorted(chosen.sample(every, min(most, len(every)))))


def draw_again(rows: Sequence[Row], positions: Positions, context: int | None) -> Sample:
    """Exactly these `positions` of `rows`.

    Raises `DataError` for positions that the rows do not have.
    """
    longest = min(LONGEST, context or LONGEST)
    if not all(0 <= number < len(rows) for number in positions.rows):
        raise DataError(f"the certificate has positions of a row that it lacks, of {len(rows)}")
    cut = [tuple(rows[number]["input_ids"][:longest]) for number in positions.rows]
    places = [(row, index) for row, inside in enumerate(positions.indices) for index in inside]
    if not places or any(row >= len(cut) or not 0 <= at < len(cut[row]) - 1 for row, at in places):
        raise DataError("the certificate has positions that are not in its rows")
    return _sample(rows, positions.rows, cut, places)


def _sample(
    rows: Sequence[Row],
    numbers: Sequence[int],
    cut: Sequence[tuple[int, ...]],
    positions: Sequence[tuple[int, int]],
) -> Sample:
    labels = [rows[number].get("labels") for number in numbers]
    answers = [(row_labels := labels[row]) is None or row_labels[at + 1] != IGNORED for row, at in positions]
    return Sample(tuple(cut), tuple(positions), tuple(answers), len(rows), tuple(numbers))


def least_share(share: float, count: int) -> float:
    """The lower end of the 95 % interval of a share seen in `count` trials (Wilson)."""
    if not count:
        return 0.0
    z = 1.959964
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count))
