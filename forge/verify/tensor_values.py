"""The values of a GGUF's tensors, by gguf's own reading of the types. Runs in a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge.model.gguf_header import NUMBERS, TYPES, GgufTensor


def raw_rows(path: Path, tensor: GgufTensor) -> Any:
    """The rows of a tensor as they lie in the file, mapped: blocks of bytes, or numbers of 16 or 32 bits."""
    import numpy as np

    data = np.memmap(path, np.uint8, "r", tensor.start, (tensor.end - tensor.start,))
    if tensor.type in ("F16", "F32"):
        return data.view(np.float16 if tensor.type == "F16" else np.float32).reshape(tensor.shape)
    return data.reshape(*tensor.shape[:-1], -1)


def first_columns(raw: Any, kind: str, count: int) -> Any:
    """Of `raw_rows` of a matrix the first `count` columns, which are whole blocks."""
    _, block, size = TYPES[NUMBERS[kind]]
    return raw[:, : count if kind in ("F16", "F32") else count // block * size]


def float32_of(raw: Any, kind: str) -> Any:
    """Rows of the type `kind` as a tensor of torch."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(np.array(dequantize(raw, GGMLQuantizationType[kind]), dtype=np.float32))
