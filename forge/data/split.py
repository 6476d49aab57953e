"""Training rows and held-out rows: disjoint, and the same on every machine."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from heapq import nsmallest

from forge import report
from forge.data.conversation import Conversation, Place
from forge.data.problems import refuse
from forge.errors import DataError


def split(
    conversations: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out). `share` under 1 is a fraction of the rows, else their number.

    Rows that say the same stay on one side (pitfall 63). Which side depends on the text and the
    seed only, so adding a row to the data moves no other row by chance of order. Raises `DataError`
    when no row is left to train on.
    """
    each = report.track("compare rows", conversations, len(conversations))
    held = held_out([bytes.fromhex(conversation.fingerprint) for conversation in each], share, seed)
    training = [row for row in conversations if bytes.fromhex(row.fingerprint) not in held]
    return training, [row for row in conversations if bytes.fromhex(row.fingerprint) in held]


def held_out(marks: Sequence[bytes], share: float, seed: int) -> set[bytes]:
    """Those of the rows' fingerprints, one a row, whose rows are held out, as `split` does it."""
    wanted = round(share * len(marks)) if share < 1 else int(share)
    sizes = Counter(marks)
    held: set[bytes] = set()
    count = 0
    for mark in nsmallest(wanted, sizes, key=lambda mark: _drawn(seed, mark)):
        if count >= wanted:
            break
        held.add(mark)
        count += sizes[mark]
    if len(held) == len(sizes):
        raise DataError(
            f"data.eval: {count} held-out rows of {len(marks)} leaves none to train on",
            hint="give a fraction such as 0.1; rows that say the same are held out together",
        )
    return held


def _drawn(seed: int, mark: bytes) -> bytes:
    return hashlib.sha256(f"{seed}:{mark.hex()}".encode()).digest()


def weighted(rows: Sequence[Conversation], seed: int) -> list[Conversation]:
    """The rows as often as their source's weight says."""
    return [row for row in rows for _ in range(times(row.weight, bytes.fromhex(row.fingerprint), seed))]


def times(weight: float, mark: bytes, seed: int) -> int:
    """How often a row of this weight is learned: 2.5 is twice, and for half of the rows once more.

    Which half depends only on the text and the seed.
    """
    whole, part = divmod(weight, 1)
    drawn = int.from_bytes(_drawn(seed, mark)[:4], "big") / 16**8 if part else 1
    return int(whole) + (drawn < part)


def refuse_overlap(training: Sequence[Conversation], heldout: Sequence[Conversation]) -> None:
    """A held-out row that is also trained on proves nothing (pitfall 63)."""
    known = {conversation.fingerprint for conversation in training}
    refuse_same([conversation.place for conversation in heldout if conversation.fingerprint in known])


def refuse_same(places: Sequence[Place]) -> None:
    """Refuse held-out rows that are training rows too, by their places."""
    problems = [place.problem("this held-out row is also a training row") for place in places]
    refuse(
        problems, f"data.eval: {len(problems)} held-out rows are training rows too", "remove them from one"
    )
