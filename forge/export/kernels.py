"""ggml's quantization, by the slab: its own library's, or the compiled kernels that give the same bytes.

Runs in a worker. `ggml_quantize_chunk`, of the library that llama-cpp-python brings, is the same code as
llama-quantize; called by the same rows it gives the same bytes, and how rows are cut into slabs and spread
over threads changes none (ctypes lets go of Python's lock). For Q4_K and Q6_K, whose search takes most of
an export, there are kernels of forge's own (`compiled`), several times as fast: they are used where they
give ggml's bytes in this very process. An
importance matrix, which the compiled kernels do not know, leaves a tensor to ggml's own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from forge import report
from forge.errors import MissingToolError, StageError, UnmadeTypeError
from forge.export.compiled import library_file
from forge.model.gguf_header import NUMBERS, TYPES

# Takes float32 (rows, width), C-contiguous, and the bytes to fill.
Kernel = Callable[[Any, Any], None]
_COMPILED = {"Q4_K": "quantize_q4_K", "Q6_K": "quantize_q6_K"}
# `ggml` leaves every type to ggml's own library.
CHOICE = "FORGE_KERNELS"
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
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
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


def ggml_kernel(kind: str, importance: Any = None) -> Kernel:
    """ggml's own, of any type, rounding by `importance` (float32, one value a column) where there is one.

    The kernel raises `StageError` when ggml fills fewer bytes or more, `UnmadeTypeError` when it cannot go
    without importance.
    """
    weights = None if importance is None else importance.ctypes.data

    def quantize(values: Any, made: Any) -> None:
        rows, width = values.shape
        library, number = ggml(), NUMBERS[kind]
        if importance is None and library.ggml_quantize_requires_imatrix(number):
            raise UnmadeTypeError(
                f"the importance matrix says nothing of it, and it would be {kind}",
                hint="no token of the rows came to this weight; use a type of three bits or more",
            )
        written = library.ggml_quantize_chunk(
            number, values.ctypes.data, made.ctypes.data, 0, rows, width, weights
        )
        if written != made.nbytes:
            raise StageError(f"{kind} gave {written:,} bytes instead of {made.nbytes:,}")

    return quantize


def compiled_kernels(library: Path, lanes: int = 16) -> dict[str, Kernel]:
    """Those of a library that `compile_kernels` made, by type; raises OSError when it cannot be loaded.

    `lanes` of SIMD are used at most: 16 is AVX-512, 8 is AVX2, fewer is what every processor has.
    """
    loaded = ctypes.CDLL(str(library))

    def kernel(symbol: str) -> Kernel:
        function = getattr(loaded, symbol)
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        return lambda values, made: function(values.ctypes.data, made.ctypes.data, values.size // 256, lanes)

    return {kind: kernel(symbol) for kind, symbol in _COMPILED.items()}


def choose_kernels(tools: Path, kinds: Iterable[str]) -> dict[str, Kernel]:
    """The compiled kernels in the directory `tools` for those of `kinds` where their bytes are ggml's.

    Types that are left out are ggml's own to quantize; the reason is reported.
    """
    wanted = sorted(set(kinds) & _COMPILED.keys())
    if not wanted or os.environ.get(CHOICE) == "ggml":
        return {}
    try:
        compiled = compiled_kernels(library_file(tools))
    except OSError:
        report.detail("there are no compiled kernels, so ggml's own take longer; forge setup compiles them")
        return {}
    chosen = {kind: compiled[kind] for kind in wanted if _agrees(kind, compiled[kind])}
    left_out = [kind for kind in wanted if kind not in chosen]
    if left_out:
        report.info(
            f"the compiled kernels of {', '.join(left_out)} do not give the bytes of this ggml, "
            "so its own are used: this takes longer and changes nothing else"
        )
    return chosen


def _agrees(kind: str, kernel: Kernel) -> bool:
    """Whether `kernel` gives ggml's bytes for a few hundred blocks.

    A ggml compiled with other rules of rounding (products fused with sums) differs in some of every hundred.
    """
    values = _sample()
    ours, theirs = quantized(kind, values, kernel), quantized(kind, values, ggml_kernel(kind))
    return bool((ours == theirs).all())


@cache
def _sample() -> Any:
    """512 blocks of plain, one-sided, heavy-tailed, uneven, constant and zero values, always the same."""
    import numpy as np

    random = np.random.Generator(np.random.PCG64(0))
    values = random.standard_normal((512, 8, 32), np.float32)
    values[64:128] = np.abs(values[64:128])
    values[128:192] -= 3
    values[192:256] **= 5
    values[256:320] *= 10 ** random.uniform(-6, 3, (64, 8, 1)).astype(np.float32)
    values[320:336, ::2] = 0.25
    values[336:352, 1::2] = 0
    return values.reshape(512, 256)


def quantized(kind: str, values: Any, kernel: Kernel) -> Any:
    """`values`, float32 (rows, width) with a width of whole blocks, as the bytes of ggml's type `kind`."""
    import numpy as np

    _, block, block_bytes = TYPES[NUMBERS[kind]]
    made = np.empty(values.size // block * block_bytes, np.uint8)
    kernel(values, made)
    return made


def quantize_rows(
    name: str, kind: str, values: Any, kernels: Mapping[str, Kernel], importance: Any = None
) -> Any:
    """`values`, float32 (rows, width), as the bytes of ggml's type `kind`, by ours of `kernels` or ggml's.


    `importance` is a float32 array (width,): columns of greater values are rounded with more care.
    Raises `UnmadeTypeError` that says which tensor, `name`, has values that the type cannot hold.
    """
    kernel = kernels.get(kind) if importance is None else None
    try:
        made = quantized(kind, values, kernel or ggml_kernel(kind, importance))
    except StageError as error:
        error.message = f"{name}: {error.message}"
        raise
    if not ggml().ggml_validate_row_data(NUMBERS[kind], made.ctypes.data, made.nbytes):
        raise UnmadeTypeError(
            f"{name} has values that {kind} cannot hold",
            hint="export it as bf16 or f32, or as a quantized type",
        )
    return made
