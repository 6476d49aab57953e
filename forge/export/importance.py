"""An importance matrix: what each column of a weight is multiplied by, for rounding by it. Runs in a worker.

Of every matrix product it holds the sum of the squares of the inputs, column by column, over so many
tokens; each expert has its own. The file is the one that llama-imatrix writes, so that
`llama-quantize --imatrix` reads it, and the means are taken from it as llama-quantize takes them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.errors import DataError
from forge.model.gguf_header import GgufTensor, read_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"

Importance = Mapping[str, Any]
"""Mean squares by the GGUF's name of the weight: float32 of shape (matrices, width)."""


def write_importance(path: Path, sums: Mapping[str, tuple[Any, Any]], rows: int, longest: int) -> None:
    """Write sums of squares (matrices, width) and counts (matrices,) by name as an imatrix GGUF.

    They were taken over `rows` rows of at most `longest` tokens.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["training rows"])
    writer.add_uint32("imatrix.chunk_count", rows)
    writer.add_uint32("imatrix.chunk_size", longest)
    for name, (squares, counts) in sorted(sums.items()):
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(squares, np.float32))
        writer.add_tensor(name + _COUNTS, np.ascontiguousarray(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights_in(path: Path) -> list[str]:
    """The weights that an imatrix GGUF is about; raises `DataError` for another file."""
    tensors = read_gguf(path).tensors
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names or any(name + _COUNTS not in tensors for name in names):
        raise DataError(f"{path} is no importance matrix", hint="llama-imatrix writes one")
    return names


def read_importance(path: Path) -> Importance:
    """The means of an imatrix GGUF; raises `DataError` for another file.

    An expert that no token came to has ones: each of its columns counts the same.
    """
    import numpy as np

    tensors = read_gguf(path).tensors
    importance = {}
    for name in weights_in(path):
        sums, counts = (_values(path, tensors[name + end]) for end in (_SUMS, _COUNTS))
        sums = sums.reshape(counts.size, -1)
        counts = counts.reshape(-1, 1)
        importance[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
    return importance


def _values(path: Path, tensor: GgufTensor) -> Any:
    import numpy as np

    return np.fromfile(path, np.float32, (tensor.end - tensor.start) // 4, offset=tensor.start)


def as_parameter(importance: Importance) -> Any:
    """What `llama_model_quantize_params.imatrix` takes; good for as long as `importance` is."""
    import llama_cpp

    floats = ctypes.POINTER(ctypes.c_float)
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last one is empty
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data_as(floats), values.size
    return ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
