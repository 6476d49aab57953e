"""A quantized file's tensors beside llama.cpp's own of that type, one by one. Runs in a worker.

Logits say how good a file is as a whole: in four bits a tensor that lost too much, or is another one, may
move them by less than rounding does. So every tensor whose bytes differ is held against llama.cpp's own f16,
which is itself held to the reference, and may be no further from it than llama.cpp's own is.

Not covered: what differs in few rows of a large tensor (`weights` looks at rows); tensors that llama.cpp's
own has not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge.model.gguf_header import GgufHeader, GgufTensor, read_gguf
from forge.verify.measurement import Beside, Worse
from forge.verify.tensor_values import float32_of, raw_rows
from forge.verify.token_rows import EMBEDDING, HEAD

_VALUES, _ROWS = 1 << 19, 64
"""Of a tensor at least as many of each, rows at even steps, are looked at."""
_TIMES, _TIMES_OF_OTHERS = 2.0, 1.15
"""How many times the usual rest a tensor may have, and one of another type. Rests of a type are even to a few
per cent, and somewhat larger by an importance matrix."""
_SLACK = 3e-3
"""And what of its norm besides: a base that was merged or kept in bfloat16 on the way."""


def compare_tensors(path: Path, own: Path, f16: Path, *, same_types: bool) -> Beside:
    """The tensors of `path` that are worse than llama.cpp's `own`, are of other types, or are missing.

    `same_types`: the file is of the very mixture that `own` is.
    """
    file, theirs, exact = (read_gguf(header) for header in (path, own, f16))
    worse, others = {}, {}
    for name, usual in theirs.tensors.items():
        tensor = file.tensors.get(name)
        if tensor is None or name not in exact.tensors or _are_equal(path, tensor, own, usual):
            continue
        times = _TIMES
        if tensor.type != usual.type:
            others[name] = (tensor.type, usual.type)
            if not same_types and tensor.shape == usual.shape:
                continue
            times = _TIMES_OF_OTHERS
        rest, least = 1.0, 0.0
        if tensor.shape == usual.shape:
            rest, least = (
                _rest(_some(*held), _some(f16, exact.tensors[name]))
                for held in ((path, tensor), (own, usual))
            )
        if not rest <= times * least + _SLACK:
            worse[name] = Worse(tensor.type, usual.type, round(rest, 6), round(least, 6))
    missing = theirs.tensors.keys() - file.tensors.keys()
    if HEAD in missing and _are_equal(f16, exact.tensors[HEAD], f16, exact.tensors[EMBEDDING]):
        missing -= {HEAD}  # llama.cpp takes the embedding
    return Beside(worse, others, tuple(sorted(missing)))


def is_weighted(header: GgufHeader) -> bool:
    """Whether a file says that it was rounded by an importance matrix; some tensors have other types then."""
    return any(name.startswith("quantize.imatrix.") for name in header.metadata)


def _rest(values: Any, exact: Any) -> float:
    return float((values - exact).norm() / exact.norm().clamp_min(1e-30))


def _are_equal(path: Path, tensor: GgufTensor, own: Path, usual: GgufTensor) -> bool:
    import numpy as np

    if (tensor.type, tensor.shape) != (usual.type, usual.shape):
        return False
    return bool(np.array_equal(raw_rows(path, tensor), raw_rows(own, usual)))


def _some(path: Path, tensor: GgufTensor) -> Any:
    """Rows of a tensor at even steps, in float32."""
    import numpy as np

    raw = raw_rows(path, tensor)
    rows, width = raw.reshape(-1, raw.shape[-1]), tensor.shape[-1]
    count = min(len(rows), max(_ROWS, _VALUES // width))
    return float32_of(rows[np.linspace(0, len(rows) - 1, count, dtype=int)], tensor.type)
