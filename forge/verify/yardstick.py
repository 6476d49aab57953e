"""The files that a GGUF is measured by: llama.cpp's own f16 conversion and its own quantization.

The one place where `verify` makes anything with `export`. Runs in a worker; both files are temporary.
"""

from __future__ import annotations

from pathlib import Path

from forge.export.requantize import quantize_file
from forge.export.request import ExportRequest, Ingredients, MergeBase
from forge.export.run import GGUF_FILE, export


def make_f16(
    out: Path,
    *,
    base: Path,
    adapter: Path | None,
    tokenizer: Path,
    chat_template: str | None,
    converters: Path,
    end_of_turn_id: int | None = None,
    merge_base: str = "original",
) -> Path:
    """An f16 GGUF of base and adapter in `out`, an empty directory; raises what `export` raises."""
    nf4_or_original: MergeBase = "nf4" if merge_base == "nf4" else "original"
    model = Ingredients(base, adapter, tokenizer, chat_template, converters, end_of_turn_id, nf4_or_original)
    return export_f16(model, out)


def export_f16(model: Ingredients, out: Path) -> Path:
    """An f16 GGUF of `model` in `out`, an empty directory; raises what `export` raises."""
    export(ExportRequest(model, out, name="yardstick", quant="f16"))
    return out / GGUF_FILE


def make_quantized(f16: Path, target: Path, quant: str, threads: int, importance: Path | None = None) -> Path:
    """llama.cpp's own quantization of `f16` as `target`, by the `importance` matrix where there is one.

    Without one it makes no type that needs it. Raises `StageError` with llama.cpp's last words.
    """
    quantize_file(f16, target, quant, threads, importance)
    return target
