"""ggml's own quantization, by the slab: `ggml_quantize_chunk` of the library that llama-cpp-python brings.

Runs in a worker. The same code as llama-quantize, called by the same rows, gives the same bytes; how
rows are cut into slabs and spread over threads changes none (ctypes lets go of Python's lock).
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

from forge.errors import MissingToolError, StageError
from forge.model.gguf_header import NUMBERS, TYPES

_ENDINGS = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


@cache
def ggml() -> Any:
    """ggml's base library, with the types of what forge calls in it."""
    import llama_cpp

    path = Path(llama_cpp.__file__).parent / "lib" / _ENDINGS.get(sys.platform, "libggml-base.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingToolError(
            f"llama-cpp-python has no {path.name}: {error}",
            hint="install it again: pip install llama-cpp-python",
        ) from error
    floats = ctypes.POINTER(ctypes.c_float)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
    ]  # fmt: skip
    library.ggml_get_name.restype = ctypes.c_void_p  # the address, not a copy of what is there
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.ggml_op_name.restype = ctypes.c_char_p
    library.ggml_op_name.argtypes = [ctypes.c_int]
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_nbytes.argtypes = [ctypes.c_void_p]
    library.ggml_backend_tensor_get.restype = None
    library.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
    ]  # fmt: skip
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return library


def quantize_rows(name: str, kind: str, values: Any, importance: Any = None) -> Any:
    """`values`, a float32 array (rows, width), as the bytes of ggml's type `kind`.

    `importance` is a float32 array (width,): columns of greater values are rounded with more care.
    Raises `StageError` that says which tensor, `name`, has values that the type cannot hold.
    """
    import numpy as np

    rows, width = values.shape
    _, block, block_bytes = TYPES[NUMBERS[kind]]
    made = np.empty(rows * width // block * block_bytes, np.uint8)
    floats = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    library, number = ggml(), NUMBERS[kind]
    if importance is None and library.ggml_quantize_requires_imatrix(number):
        raise StageError(
            f"{name} would be {kind}, and the importance matrix says nothing of it",
            hint="no token of the rows came to this weight; use a type of three bits or more",
        )
    weights = None if importance is None else importance.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    written = library.ggml_quantize_chunk(number, floats, made.ctypes.data, 0, rows, width, weights)
    if written != made.nbytes:
        raise StageError(f"{name}: {kind} gave {written:,} bytes instead of {made.nbytes:,}")
    if not library.ggml_validate_row_data(number, made.ctypes.data, made.nbytes):
        raise StageError(
            f"{name} has values that {kind} cannot hold",
            hint="export it as bf16 or f32, or as a quantized type",
        )
    return made
