"""The files that a GGUF is measured by: llama.cpp's own f16 conversion and its own quantization.

The one place where `verify` makes anything with `export`. Runs in a worker; both files are temporary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forge.export.repair import laid_out
from forge.export.requantize import quantize_file
from forge.export.request import ExportRequest, Ingredients
from forge.export.run import GGUF_FILE, HEADER, export_gguf
from forge.model.gguf_header import GgufHeader, LongArray, read_gguf
from forge.verify.measurement import VerifyRequest

_BLOCK = 1 << 24


def model_of(request: VerifyRequest) -> Ingredients:
    """What the file of `request` should have been made of, without an adapter that lies beside it."""
    return Ingredients(
        request.base,
        None if request.lora else request.adapter,
        request.tokenizer,
        request.chat_template,
        request.converters,
        request.end_of_turn_id,
        request.merge_base,
    )


def make_header(model: Ingredients, out: Path) -> Path:
    """The header of such a GGUF in the empty directory `out`, without its weights; raises as `export_f16`."""
    laid_out(model, "yardstick", out)
    return out / HEADER


def export_f16(model: Ingredients, out: Path) -> Path:
    """An f16 GGUF of `model` in the directory `out`; raises what `export` raises."""
    export_gguf(ExportRequest(model, out, name="yardstick", quant="f16"))
    return out / GGUF_FILE


def computes_the_same(path: Path, other: Path) -> bool:
    """Whether two GGUFs have the same tensors, to the bit, and the same settings of the model.

    Then llama.cpp gives the same logits of both: their names, templates and vocabularies have no part in it.
    """
    own, others = read_gguf(path), read_gguf(other)
    if _settings(own) != _settings(others) or own.tensors.keys() != others.tensors.keys():
        return False
    with path.open("rb") as first, other.open("rb") as second:
        for name, tensor in own.tensors.items():
            twin = others.tensors[name]
            if (tensor.type, tensor.shape) != (twin.type, twin.shape):
                return False
            first.seek(tensor.start)
            second.seek(twin.start)
            left = tensor.end - tensor.start
            while left:
                block = first.read(min(left, _BLOCK))
                if not block or block != second.read(len(block)):
                    return False
                left -= len(block)
    return True


def _settings(header: GgufHeader) -> Mapping[str, object]:
    """What llama.cpp reads of the model itself."""
    beside = ("general.", "tokenizer.", "quantize.")
    settings = {key: value for key, value in header.metadata.items() if not key.startswith(beside)}
    # An array that was left in the file is not known here: no two are taken for the same.
    unread = {key: object() for key, value in settings.items() if isinstance(value, LongArray)}
    return {"general.architecture": header.architecture, **settings, **unread}


def make_quantized(f16: Path, target: Path, quant: str, threads: int, importance: Path | None = None) -> Path:
    """llama.cpp's own quantization of `f16` as `target`, by the `importance` matrix where there is one.

    Without one it makes no type that needs it. Raises `StageError` with llama.cpp's last words.
    """
    quantize_file(f16, target, quant, threads, importance)
    return target
