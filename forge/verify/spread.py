"""Which tensors of a model are looked at, where all would be too many."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\.\d+(?=\.)")


def spread(names: Sequence[str], most: int = 64) -> list[str]:
    """At most `most` of a checkpoint's names, those outside of the layers always among them.

    Each kind of tensor (a layer's name without its number) in turn, at even steps from the first layer to the
    last.
    """
    if len(names) <= most:
        return list(names)
    kinds: dict[str, list[str]] = {}
    for name in names:
        if _NUMBER.search(name):
            kinds.setdefault(_NUMBER.sub(".", name), []).append(name)
    chosen = dict.fromkeys(name for name in names if not _NUMBER.search(name))
    each, room = list(kinds.values()), max(0, most - len(chosen))
    for number in range(room):
        kind = each[number % len(each)]
        chosen[kind[(len(kind) - 1) * number // max(1, room - 1)]] = None
    # Where two steps led to the same name there is room for another.
    left = (name for name in names if name not in chosen)
    return [*chosen, *left][: max(most, len(chosen))]
