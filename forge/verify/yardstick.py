"""The files that a GGUF is measured by: llama.cpp's own f16 conversion and its own quantization.

The one place where `verify` makes anything with `export`. Runs in a worker; both files are temporary.
"""

from __future__ import annotations

from pathlib import Path

from forge.export.requantize import quantize_file
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
    settings = {"name": "yardstick", "quant": "f16", "keep_merged": False, "threads": None}
    settings |= {"merge_base": merge_base, "end_of_turn_id": end_of_turn_id}
    export(
        base=str(base),
        adapter=str(adapter) if adapter else None,
        tokenizer=str(tokenizer),
        chat_template=chat_template,
        data=None,
        out=str(out),
        converters=str(converters),
        settings=settings,
    )
    return out / GGUF_FILE


def make_quantized(f16: Path, target: Path, quant: str, threads: int, importance: Path | None = None) -> Path:
    """llama.cpp's own quantization of `f16` as `target`, by the `importance` matrix where there is one.

    Without one it makes no type that needs it. Raises `StageError` with llama.cpp's last words.
    """
    quantize_file(f16, target, quant, threads, importance)
    return target
