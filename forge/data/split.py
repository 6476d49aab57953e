"""Training rows and held-out rows: disjoint, and the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from forge.data.conversation import Conversation
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
    wanted = round(share * len(conversations)) if share < 1 else int(share)
    order = {
        mark: hashlib.sha256(f"{seed}:{mark}".encode()).hexdigest()
        for mark in {conversation.fingerprint for conversation in conversations}
    }
    held: set[str] = set()
    count = 0
    sizes: dict[str, int] = {}
    for conversation in conversations:
        mark = conversation.fingerprint
        sizes[mark] = sizes.get(mark, 0) + 1
    for mark in sorted(sizes, key=order.__getitem__):
        if count >= wanted:
            break
        held.add(mark)
        count += sizes[mark]
    training = [row for row in conversations if row.fingerprint not in held]
    heldout = [row for row in conversations if row.fingerprint in held]
    if not training:
        raise DataError(
            f"data.eval: {len(heldout)} held-out rows of {len(conversations)} leaves none to train on",
            hint="give a fraction such as 0.1; rows that say the same are held out together",
        )
    return training, heldout


def weighted(rows: Sequence[Conversation], seed: int) -> list[Conversation]:
    """The rows as often as their source's weight says: 2.5 is each twice, and half of them once more.

    Which half depends only on the text and the seed.
    """
    chosen: list[Conversation] = []
    for row in rows:
        whole, part = divmod(row.weight, 1)
        drawn = int(hashlib.sha256(f"{seed}:{row.fingerprint}".encode()).hexdigest()[:8], 16) / 16**8
        chosen += [row] * (int(whole) + (drawn < part))
    return chosen


def refuse_overlap(training: Sequence[Conversation], heldout: Sequence[Conversation]) -> None:
    """A held-out row that is also trained on proves nothing (pitfall 63)."""
    known = {conversation.fingerprint for conversation in training}
    problems = [
        conversation.place.problem("this held-out row is also a training row")
        for conversation in heldout
        if conversation.fingerprint in known
    ]
    refuse(
        problems, f"data.eval: {len(problems)} held-out rows are training rows too", "remove them from one"
    )
