"""Which type each tensor gets, decided by llama.cpp itself on a header without weights. Runs in a worker.

The header is a sparse file: its size is that of the model, its bytes on disk are the metadata's. On
it llama.cpp loads the vocabulary (`proof`), checks every shape against the architecture, and says
in a dry run of `llama_model_quantize` what it would make of each tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from forge.errors import StageError, UnexportableError, UnmadeTypeError
from forge.export.header import write_header
from forge.export.importance import Importance, as_parameter
from forge.export.upstream import Converted, extents
from forge.model.gguf_header import TYPES, GgufHeader

UNQUANTIZED = ("f16", "bf16", "f32")
# [   1/ 219] output.weight - [ 1536, 32000,  1,  1], type =  f16, size = 93.75 MiB -> 26.37 MiB (q6_K)
_TENSOR = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[[^\]]*\], type = *(\S+), size = (?:.*->.*\((\S+)\))?")
_BLOCKS = {name: block for name, block, _ in TYPES.values()}
_WEIGHTED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_EVEN = ("token_embd.", "output.", "per_layer_token_embd.")  # rounded without a matrix in any type
_MIXTURE_BLOCK = 256  # q4_k_m and all others that are no tensor's type


def write_sparse(converted: Converted, path: Path) -> int:
    """Write `converted`'s header as a GGUF whose weights are holes; returns the header's bytes."""
    start = write_header(converted, path, converted.metadata, converted.types)
    alignment = converted.writer.data_alignment
    sizes = (-(-size // alignment) * alignment for _, size in extents(converted.types, converted))
    os.truncate(path, start + sum(sizes))
    return start


def decide_types(converted: Converted, sparse: Path, quant: str, importance: Importance) -> dict[str, str]:
    """Type by tensor, in the order of the file that llama_model_quantize would write.

    `sparse` is the header of `converted`; with an `importance` matrix some tensors get another type.
    Raises `UnmadeTypeError` with llama.cpp's own words.
    """
    if quant in UNQUANTIZED:
        return dict(converted.types)
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type(quant)
    parameters.dry_run = True
    if importance:
        parameters.imatrix = as_parameter(importance)
    with listening() as printed:
        status = llama_cpp.llama_model_quantize(str(sparse).encode(), b"unused", ctypes.byref(parameters))
    if "will require an imatrix" in "".join(printed):
        raise UnmadeTypeError(
            f"{quant} needs an importance matrix",
            hint="set export.imatrix: true in the recipe, or give forge export rows with --data",
        )
    if status:
        raise UnmadeTypeError(
            f"llama.cpp cannot make {quant} of this model: {last_words(printed)}",
            hint="the whole output is in the run's log",
        )
    types = {name: (new or old).upper() for name, old, new in _TENSOR.findall("".join(printed))}
    if types.keys() != converted.types.keys():
        raise StageError("llama.cpp did not say which type each tensor gets", hint="this is a bug; report it")
    _refuse_unweighted(types, quant, importance)
    return types


def _refuse_unweighted(types: Mapping[str, str], quant: str, importance: Importance) -> None:
    """llama.cpp makes the lowest types of no weight that its matrix does not know (llama-quant.cpp)."""
    for name, kind in types.items():
        if _needs_importance(name, kind) and name not in importance:
            raise UnmadeTypeError(
                f"{name} would be {kind}, and the importance matrix says nothing of it",
                hint=f"no token of the rows came to it: choose a larger type than {quant}",
            )


def _needs_importance(name: str, kind: str) -> bool:
    return kind in _WEIGHTED and not name.startswith(_EVEN)


def is_made_by_importance(header: GgufHeader, quant: str) -> bool:
    """Whether llama.cpp makes such a file of type `quant` with an importance matrix only."""
    held = any(_needs_importance(name, tensor.type) for name, tensor in header.tensors.items())
    return held or quant.upper() in _WEIGHTED


def refuse_unloadable(path: Path) -> None:
    """Raise `UnexportableError` when llama.cpp does not load the model in `path`; its weights are not read.

    The converter does not look at every number of a configuration: GPT-2's takes the width of the
    MLP for granted, and its file then fails wherever it is loaded.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.no_alloc = True
    parameters.load_mode = 0
    with listening() as printed:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if model:
            llama_cpp.llama_model_free(model)
    if not model:
        raise UnexportableError(
            f"llama.cpp cannot load the converted model: {last_words(printed)}",
            hint="its converter does not cover this configuration of the architecture; use another base",
        )


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """llama.cpp's log, which is all that it reports of errors."""
    import llama_cpp
    from llama_cpp import _logger

    printed: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, user_data: object) -> None:
        printed.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    try:
        yield printed
    finally:
        # llama.cpp would call `log` ever after, and it is gone when this function is.
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def last_words(texts: Sequence[str]) -> str:
    """The last line that speaks of an error, else the last words."""
    lines = [line.strip() for line in "".join(texts).splitlines()]
    for word in ("error", "failed"):
        if matching := [line for line in lines if word in line.lower()]:
            return matching[-1]
    return " ".join(" ".join(lines).split()[-40:])


def file_type(quant: str) -> int:
    """llama.cpp's `llama_ftype` of a type's name, such as 15 for q4_k_m; raises `StageError` without one."""
    if quant not in (known := file_types()):
        raise StageError(f"llama.cpp makes no files of type {quant}", hint=f"it makes {', '.join(known)}")
    return known[quant]


def type_name(number: object) -> str | None:
    """The type's name of a `llama_ftype`, such as q4_k_m for 15; None for a number without one."""
    return next((name for name, known in file_types().items() if known == number), None)


def file_types() -> dict[str, int]:
    """llama.cpp's `llama_ftype` by the type's name, all that it can make."""
    import llama_cpp

    prefixes = ("LLAMA_FTYPE_ALL_", "LLAMA_FTYPE_MOSTLY_")
    return {
        name.removeprefix(prefix).lower(): getattr(llama_cpp, name)
        for prefix in prefixes
        for name in dir(llama_cpp)
        if name.startswith(prefix)
    }


def fallbacks(types: Mapping[str, str], converted: Converted, quant: str) -> dict[str, str]:
    """Tensors whose rows the type that was asked for cannot hold, with the type they got."""
    return rows_not_held(types, {name: info.shape for name, info in converted.tensors.items()}, quant)


def rows_not_held(
    types: Mapping[str, str], shapes: Mapping[str, Sequence[int]], quant: str
) -> dict[str, str]:
    """As `fallbacks`, from shapes (rows first) by name."""
    if quant in UNQUANTIZED:
        return {}
    block = _BLOCKS.get(quant.upper(), _MIXTURE_BLOCK)
    return {
        name: kind
        for name, kind in types.items()
        if kind != "F32" and len(shapes[name]) > 1 and shapes[name][-1] % block
    }
