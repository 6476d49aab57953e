"""Quantizing a GGUF with llama.cpp's own code, and reading back what became of each tensor.

Runs in a worker; `llama_model_quantize` gives the bytes of the llama-quantize program. It reports
errors through its log alone and leaves a truncated file behind, so the log is kept and the file
read back.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from forge import report
from forge.errors import StageError
from forge.model.gguf_header import GgufHeader, read_gguf

# Block length of the K and IQ types (ggml's QK_K): rows of other widths fall back to a coarser type.
_BLOCK = 256
_TENSOR_LINE = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


def quantize(source: Path, target: Path, quant: str, threads: int) -> GgufHeader:
    """Write `source` (F16, BF16 or F32) as `quant` to `target`; returns the header read back.

    Raises `StageError` with llama.cpp's own last words.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type(quant)
    parameters.nthread = threads
    with listening() as said:
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
    if status:
        target.unlink(missing_ok=True)
        raise StageError(
            f"quantizing to {quant} failed: {last_words(said)}", hint="the whole output is in the run's log"
        )
    return read_gguf(target)


def refuse_unloadable(path: Path) -> None:
    """Raise `StageError` when llama.cpp does not load the model in `path`; its weights stay on disk.

    The converter does not look at every number of a configuration: GPT-2's takes the width of the
    MLP for granted, and its file then fails wherever it is loaded.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.use_extra_bufts = False  # would repack, that is read and copy, all weights
    with listening() as said:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if model:
            llama_cpp.llama_model_free(model)
    if not model:
        raise StageError(
            f"llama.cpp cannot load the converted model: {last_words(said)}",
            hint="its converter does not cover this configuration of the architecture; use another base",
        )


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """What llama.cpp says, which is all that it tells of errors; its progress is passed on."""
    import llama_cpp
    from llama_cpp import _logger

    said: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, user_data: object) -> None:
        line = text.decode(errors="replace")
        said.append(line)
        if found := _TENSOR_LINE.match(line):
            report.advance("quantize", int(found[1]), int(found[2]))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    try:
        yield said
    finally:
        # llama.cpp would call `log` ever after, and it is gone when this function is.
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def last_words(said: Sequence[str]) -> str:
    """The last line that speaks of an error, else the last words."""
    lines = [line.strip() for line in "".join(said).splitlines()]
    errors = [line for line in lines if "error" in line.lower()]
    return errors[-1] if errors else " ".join(" ".join(lines).split()[-40:])


def file_type(quant: str) -> int:
    """llama.cpp's `llama_ftype` of a type's name, such as 15 for q4_k_m."""
    import llama_cpp

    name = quant.upper()
    number: int = getattr(llama_cpp, "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}")
    return number


def fallbacks(header: GgufHeader, quant: str) -> dict[str, str]:
    """Tensors that could not have the type that was asked for, with the type they got."""
    if not re.search(r"_k|iq", quant.lower()):
        return {}
    return {
        tensor.name: tensor.type
        for tensor in header.tensors.values()
        if len(tensor.shape) > 1 and tensor.shape[-1] % _BLOCK and tensor.type not in ("F32",)
    }
