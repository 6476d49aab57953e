"""An adapter as a GGUF of its own, to be loaded beside its base's. Runs in a worker.

llama.cpp scales every layer by alpha / rank, where alpha is one number of the file. rsLoRA and
alpha_pattern have other scales, so these go into B (silent wrong 9). What has no place in the format
has a reason in `why_merged`, and is merged.
"""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from forge.adapter.directory import CONFIG_FILE, WEIGHTS_FILE
from forge.adapter.names import as_peft_writes
from forge.adapter.read import Adapter, LoraLayer
from forge.adapter.vocabulary import Fitted
from forge.errors import DataError, Problem, StageError
from forge.export.tensors import LazyTensor, read_tensor_rows, stored, write_safetensors
from forge.export.upstream import REFUSALS, load_converters, refused

SCRIPT = "convert_lora_to_gguf.py"


def why_merged(fitted: Fitted) -> tuple[str, ...]:
    """Why the adapter cannot be a GGUF of its own over this base; empty when it can."""
    return fitted.impurities


def refuse_impure(reasons: Sequence[str]) -> None:
    """Raise `DataError` with the `reasons` why an adapter must be merged, where there are any."""
    if reasons:
        raise DataError(
            "this adapter has no GGUF form of its own",
            hint="use mode merged, or auto",
            problems=[Problem(reason) for reason in reasons],
        )


def write_adapter(tree: Path, description: Path, adapter: Adapter, name: str, work: Path) -> int:
    """Write `work/adapter.gguf` in float32 for the base in `description`; its general.name is `name`.

    The converter sees a copy that holds the factors and nothing of where they came from. Returns the file's
    bytes. Raises `StageError` with the converter's own words.
    """
    scratch, target = work / "adapter" / _plain(name), work / "adapter.gguf"
    scratch.mkdir(parents=True)
    alpha = float(adapter.configuration["lora_alpha"])
    fields = {"peft_type": "LORA", "r": adapter.configuration["r"], "lora_alpha": alpha}
    (scratch / CONFIG_FILE).write_text(json.dumps(fields), encoding="utf-8")
    write_safetensors(scratch / WEIGHTS_FILE, list(_factors(adapter, alpha)), lambda done, total: None)
    load_converters(tree)
    before, sys.argv = sys.argv, [
        SCRIPT, str(scratch), "--base", str(description), "--outfile", str(target), "--outtype", "f32",
    ]  # fmt: skip
    try:
        runpy.run_path(str(tree / SCRIPT), run_name="__main__")
    except REFUSALS as refusal:
        raise refused(refusal) from refusal
    finally:
        sys.argv = before
    if not target.is_file():
        raise StageError("llama.cpp's adapter converter wrote nothing", hint="its output is in the run's log")
    return target.stat().st_size


def _factors(adapter: Adapter, alpha: float) -> Iterator[LazyTensor]:
    for layer in adapter.layers.values():
        yield stored(layer.a, as_peft_writes(layer.a.name))
        factor = layer.scale * layer.rank / alpha
        if math.isclose(factor, 1.0, rel_tol=1e-12):
            yield stored(layer.b, as_peft_writes(layer.b.name))
        else:
            yield LazyTensor(as_peft_writes(layer.b.name), "F32", layer.b.shape, _scaled(layer, factor))


def _scaled(layer: LoraLayer, factor: float) -> Any:
    return lambda start, stop: read_tensor_rows(layer.b, start, stop).float() * factor


def _plain(name: str) -> str:
    """A directory's name, which the converter makes the model's name of."""
    return (
        "".join(letter if letter.isalnum() or letter in "-_. " else "-" for letter in name).strip(". ")
        or "adapter"
    )
