"""An existing GGUF of full precision as another type, by llama.cpp's own quantizer. Runs in a worker.

Metadata stays as it is, but for the file's type. A file in several parts is named by the first of them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forge import report
from forge.errors import DataError, StageError
from forge.export.importance import as_parameter, read_importance
from forge.export.rewrite import ADAPTER_TYPES, round_adapter, split_file
from forge.export.types import (
    UNQUANTIZED,
    file_type,
    file_types,
    last_words,
    listening,
    rows_not_held,
    type_name,
)
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.model.memory import peak_memory

COPY = "copy"
"""A type as llama-quantize has it: every tensor as it is."""


@dataclass(frozen=True)
class Requantization:
    """What is asked: `gguf` as type `quant` in the file `out`, whose directory is there.

    `COPY` keeps its types; `part_bytes` is the size of a part, None for one file.
    """

    gguf: Path
    out: Path
    quant: str
    threads: int
    imatrix: Path | None = None
    part_bytes: int | None = None


@dataclass(frozen=True)
class Requantized:
    """What was made; `fallbacks` are tensors that got another type since their rows do not fit.

    `parts` are the files where there are several, the first of them what a server is given.
    """

    quant: str
    seconds: float
    bytes: int
    bytes_written: int
    peak_rss_bytes: int
    tensor_types: Mapping[str, int]
    fallbacks: Mapping[str, str]
    parts: tuple[Path, ...] = ()


def requantize(request: Requantization) -> Requantized:
    """Write `out` and read it back.

    Raises `DataError` for a file that is quantized already, `StageError` for a type that llama.cpp does not
    make of it.
    """
    started = time.monotonic()
    header = read_gguf(request.gguf)
    if request.quant not in (known := (*file_types(), COPY)):
        raise DataError(
            f"llama.cpp makes no files of type {request.quant}", hint=f"it makes {', '.join(known)}"
        )
    is_adapter = header.metadata.get("general.type") == "adapter"
    if is_adapter and request.part_bytes:
        raise DataError(
            f"{request.gguf} is an adapter, and llama.cpp loads none that is in parts",
            hint="leave out --split-size",
        )
    if request.quant == COPY:
        report.info(f"copying {request.gguf.name}")
    else:
        _refuse_quantized(header)
        report.info(f"quantizing {request.gguf.name} to {request.quant}")
    if is_adapter:
        _round_adapter(request)
    else:
        quantize_file(request.gguf, request.out, request.quant, request.threads, request.imatrix)
    made = read_gguf(request.out)
    size = request.out.stat().st_size
    kinds = {name: tensor.type for name, tensor in made.tensors.items()}
    widths = {name: tensor.shape for name, tensor in made.tensors.items()}
    quant = request.quant
    if quant == COPY:
        quant = type_name(made.metadata.get("general.file_type")) or COPY
    parts: tuple[Path, ...] = ()
    if request.part_bytes and request.part_bytes < made.weight_bytes:
        parts = split_file(request.out, request.part_bytes)
        for part in parts:
            read_gguf(part)
    return Requantized(
        quant,
        round(time.monotonic() - started, 2),
        size,
        size,
        peak_memory(),
        made.tensor_types,
        {} if request.quant == COPY else rows_not_held(kinds, widths, request.quant),
        parts,
    )


def _round_adapter(request: Requantization) -> None:
    if request.quant not in ADAPTER_TYPES or request.imatrix:
        raise DataError(
            f"{request.gguf} is an adapter, whose factors are {', '.join(ADAPTER_TYPES)}",
            hint="take one of these with --quant, and no --imatrix",
        )
    moved = round_adapter(request.gguf, request.out, request.quant)
    report.info(f"rounding moves a factor by {moved:.2%} at most (root mean square)")


def _refuse_quantized(header: GgufHeader) -> None:
    kind = type_name(header.metadata.get("general.file_type"))
    whole = {name.upper() for name in UNQUANTIZED}
    if any(tensor.type not in whole for tensor in header.tensors.values()):
        raise DataError(
            f"{header.path} is quantized already ({kind or 'several types'}); rounding it again loses more",
            hint="start from its F16, BF16 or F32 file, or from the model: forge export --base",
        )


def quantize_file(
    source: Path, target: Path, quant: str, threads: int, importance: Path | None = None
) -> None:
    """llama.cpp's quantization of the GGUF `source` as `target`, by the matrix `importance` if there is one.

    Raises `StageError` with llama.cpp's last words; nothing is left of `target` then.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    if quant == COPY:
        parameters.only_copy = True
    else:
        parameters.ftype = file_type(quant)
    parameters.nthread = threads
    means = read_importance(importance) if importance else {}
    if means:
        parameters.imatrix = as_parameter(means)
    with listening() as log:
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
    if status:
        target.unlink(missing_ok=True)
        words = last_words(log)
        hint = "make one of rows with forge export --base --data, and name it with --imatrix"
        raise StageError(
            f"llama.cpp could not {'copy it' if quant == COPY else f'quantize to {quant}'}: {words}",
            hint=hint if "matrix" in words else "",
        )
