"""The files that a GGUF is measured by: llama.cpp's own f16 conversion and its own quantization.

The one place where `verify` makes anything with `export`. Runs in a worker; both files are temporary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.export.quantize import quantize
from forge.export.run import GGUF_FILE, export


def make_f16(source: Mapping[str, Any], out: Path) -> Path:
    """An f16 GGUF of base and adapter in `out`, an empty directory; raises what `export` raises.

    `source`: base, adapter, tokenizer, chat_template, converters, end_of_turn_id.
    """
    settings = {"name": "yardstick", "quant": "f16", "keep_merged": False, "threads": None}
    export(
        base=source["base"],
        adapter=source["adapter"],
        tokenizer=source["tokenizer"],
        chat_template=source["chat_template"],
        data=None,
        out=str(out),
        converters=source["converters"],
        settings=settings | {"end_of_turn_id": source.get("end_of_turn_id")},
    )
    return out / GGUF_FILE


def make_quantized(f16: Path, quant: str, threads: int) -> Path:
    """llama.cpp's own quantization of `f16`, beside it."""
    target = f16.with_name(f"{quant}.gguf")
    quantize(f16, target, quant, threads)
    return target
