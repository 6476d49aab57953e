"""The compiled kernels against ggml's own: whether their bytes are equal, and how long they take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

from bench.measure import BenchmarkError, Outcome, median_ratio
from bench.workplace import Workplace
from forge.export.compiled import library_file
from forge.export.kernels import Kernel, compiled_kernels, ggml_kernel, quantized

BLOCKS = 10_000_000  # of each type
SLOWEST = {"Q4_K": 1 / 4, "Q6_K": 1 / 4}
_BATCH = 4096


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Ten million fuzzed blocks of each type; then the time of a million ordinary weights on one core."""
    library = library_file(place.home / "tools")
    if not library.is_file():
        raise BenchmarkError(f"there is no {library.name}: run forge setup, which needs a C++ compiler")
    for kind, ours in compiled_kernels(library).items():
        theirs = ggml_kernel(kind)
        times = range(-(-BLOCKS // (len(FUZZ) * _BATCH)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            count = sum(pool.map(partial(_wrong, kind, ours, theirs), product(times, FUZZ)))
        note = f"of {len(times) * len(FUZZ) * _BATCH:,}, {len(FUZZ)} distributions"
        yield Outcome(f"kernels {kind}, blocks that differ", count, "", 0, note=note)
        yield _time(kind, ours, theirs, pairs)


def _wrong(kind: str, ours: Kernel, theirs: Kernel, job: tuple[int, str]) -> int:
    import numpy as np

    seed, name = job
    return differing(kind, fuzzed(name, np.random.default_rng(seed), _BATCH), ours, theirs)


def _time(kind: str, ours: Kernel, theirs: Kernel, pairs: int) -> Outcome:
    import numpy as np

    values = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    found = [(_seconds(kind, values, ours), _seconds(kind, values, theirs)) for _ in range(pairs)]
    value, samples = median_ratio(found)
    speeds = [values.size / 1e6 / min(seconds) for seconds in zip(*found, strict=True)]
    note = f"{speeds[0]:.0f} M values/s, ggml {speeds[1]:.0f}"
    return Outcome(f"kernels {kind}, time", value, "x", SLOWEST[kind], samples, note)


def fuzzed(name: str, random: Any, blocks: int) -> Any:
    """Blocks of the distribution `name` of FUZZ: float32 (blocks, 256)."""
    import numpy as np

    return np.ascontiguousarray(FUZZ[name](random, blocks), np.float32).reshape(blocks, 256)


def differing(kind: str, values: Any, ours: Kernel, theirs: Kernel) -> int:
    """How many of the blocks `values`, float32 (blocks, 256), get other bytes from `ours`."""
    made, expected = (quantized(kind, values, kernel).reshape(len(values), -1) for kernel in (ours, theirs))
    return int((made != expected).any(axis=1).sum())


def _seconds(kind: str, values: Any, kernel: Kernel) -> float:
    start = time.perf_counter()
    quantized(kind, values, kernel)
    return time.perf_counter() - start


def _normal(random: Any, blocks: int) -> Any:
    import numpy as np

    return random.standard_normal((blocks, 16, 16), np.float32)


def _powers(random: Any, low: float, high: float, shape: tuple[int, ...]) -> Any:
    import numpy as np

    return (10.0 ** random.uniform(low, high, shape)).astype(np.float32)


def _constant(random: Any, blocks: int) -> Any:
    """Every stretch of 16 or of 32 one value, some of them zero."""
    import numpy as np

    each = random.standard_normal((blocks, 16, 1), np.float32) * (random.random((blocks, 16, 1)) < 0.7)
    each[::2] = np.repeat(each[::2, ::2], 2, axis=1)
    return np.broadcast_to(each, (blocks, 16, 16))


def _sparse(random: Any, blocks: int) -> Any:
    return _normal(random, blocks) * (random.random((blocks, 16, 16)) < 0.03)


def _nearly_constant(random: Any, blocks: int) -> Any:
    return random.choice([-1, 1], (blocks, 1, 1)) + _normal(random, blocks) * _powers(
        random, -8, -2, (blocks, 1, 1)
    )


def _outliers(random: Any, blocks: int) -> Any:
    return _normal(random, blocks) * (1 + 100 * (random.random((blocks, 16, 16)) < 0.01))


def _halved(random: Any, blocks: int) -> Any:
    import numpy as np

    return (_normal(random, blocks) * np.float32(0.02)).astype(np.float16)


def _truncated(random: Any, blocks: int) -> Any:
    """bfloat16's values: ties are common."""
    import numpy as np

    return (_normal(random, blocks).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _bits(random: Any, blocks: int) -> Any:
    """Any finite float, subnormal ones among them."""
    import numpy as np

    values = random.integers(0, 2**32, (blocks, 16, 16), np.uint32).view(np.float32)
    return np.where(np.isfinite(values), values, np.float32(0))


def _subnormal(random: Any, blocks: int) -> Any:
    import numpy as np

    values = random.integers(0, 2**23, (blocks, 16, 16), np.uint32)
    return (values >> random.integers(0, 20, (blocks, 1, 1), np.uint32)).view(np.float32)


def _uneven(random: Any, blocks: int) -> Any:
    """Stretches of so different a size that some get no level at all."""
    return _normal(random, blocks) * _powers(random, -12, 4, (blocks, 16, 1))


def _near_nothing(random: Any, blocks: int) -> Any:
    """Around the size, 1e-15, below which ggml takes a stretch for zero."""
    return _normal(random, blocks) * _powers(random, -18, -12, (blocks, 16, 1))


FUZZ: Mapping[str, Callable[[Any, int], Any]] = {
    "normal": lambda random, blocks: _normal(random, blocks) * _powers(random, -5, 3, (blocks, 1, 1)),
    "uniform": lambda random, blocks: random.uniform(-1, 1, (blocks, 16, 16)),
    "positive": lambda random, blocks: abs(_normal(random, blocks)),
    "negative": lambda random, blocks: -abs(_normal(random, blocks)),
    "shifted": lambda random, blocks: _normal(random, blocks) + random.uniform(-5, 5, (blocks, 16, 1)),
    "constant": _constant,
    "zero": lambda random, blocks: _normal(random, blocks) * (random.random((blocks, 16, 1)) < 0.3),
    "sparse": _sparse,
    "nearly constant": _nearly_constant,
    "outliers": _outliers,
    "heavy-tailed": lambda random, blocks: random.standard_cauchy((blocks, 16, 16)),
    "whole numbers": lambda random, blocks: random.integers(-9, 10, (blocks, 16, 16)),
    "float16": _halved,
    "bfloat16": _truncated,
    "uneven": _uneven,
    "near nothing": _near_nothing,
    "huge": lambda random, blocks: random.uniform(-3.4e38, 3.4e38, (blocks, 16, 16)),
    "subnormal": _subnormal,
    "any bits": _bits,
}
