"""How long a certificate will take: what earlier ones took on this machine, else parameters and cores.

Not covered: another load of the machine, rows much longer than usual, and a second look at more positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from forge.model.estimate import QUANT_BITS, usable_cores
from forge.stages.verify import VERIFY_STAGE
from forge.store.artifacts import Store
from forge.verify.measurement import Measurement

# bench/results/2026-11-30-verify.json: 22 s of 135 million parameters, 63 s of 0.5 billion and an adapter,
# on two cores.
_START_SECONDS, _CORE_SECONDS_OF_A_BILLION = 8.0, 220.0


@dataclass(frozen=True)
class ExpectedTime:
    """Seconds of one certificate; `measured` where they follow from one that this store has."""

    seconds: float
    measured: bool


def expected_certificate(store: Store, parameters: int) -> ExpectedTime:
    """That of a file of `parameters`: as the nearest in size took, and more where it was smaller."""
    earlier = list(_earlier(store))
    if not earlier:
        billions = parameters / 1e9
        return ExpectedTime(_START_SECONDS + _CORE_SECONDS_OF_A_BILLION * billions / usable_cores(), False)
    nearest = min(earlier, key=lambda entry: (abs(math.log(entry[0] / parameters)), -entry[1]))
    return ExpectedTime(nearest[1] * max(1.0, parameters / nearest[0]), True)


def _earlier(store: Store) -> Iterator[tuple[float, float]]:
    """Parameters, as the file's size and type say, and seconds of each certificate in the store."""
    for stage, key, _ in store.directories():
        artifact = store.find(stage, key) if stage == VERIFY_STAGE else None
        if artifact is None:
            continue
        try:
            file = artifact.read(Measurement).file
        except ValueError:
            continue  # of another version
        if file.type in QUANT_BITS:
            yield 8 * file.bytes / QUANT_BITS[file.type], artifact.seconds
