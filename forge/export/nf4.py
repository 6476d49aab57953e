"""The base as QLoRA trained on it: every linear layer through NF4 and back, in float32. Runs in a worker.

An adapter learns to make up for what NF4 lost; merged into this base it meets the weights that it was
trained beside. The same layers, blocks and double quantization as `train.model.load_base`.

The values that are quantized are the checkpoint's; where training rounded a float32 checkpoint to
bfloat16 first, its NF4 may differ in single values.

Not covered: Conv1D (GPT-2), which bitsandbytes transposes first; other block sizes than its 64.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge.adapter.read import find_base_tensor
from forge.errors import DataError, MissingToolError
from forge.export.tensors import LazyTensor
from forge.model.checkpoint import Checkpoint
from forge.model.loading import read_transformers

_BLOCK = 64


def quantized_in_training(base: Path, checkpoint: Checkpoint) -> frozenset[str]:
    """The checkpoint's tensors that a 4-bit load quantizes: linear layers but the output layer.

    Raises `DataError` for a model of Conv1D layers, `MissingToolError` without bitsandbytes.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingToolError(
            "merge_base nf4 needs bitsandbytes", hint="pip install bitsandbytes"
        ) from error
    import torch
    import transformers
    from transformers.quantizers.base import get_keys_to_not_convert

    configuration = read_transformers(base)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(configuration)
    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        raise DataError(
            f"{base}: merge_base nf4 does not cover Conv1D layers", hint="use merge_base: original"
        )
    kept = get_keys_to_not_convert(model)
    return frozenset(_tensors(model, kept, checkpoint))


def _tensors(model: Any, kept: list[str], checkpoint: Checkpoint) -> Iterator[str]:
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not any(
            name == key or name.startswith(f"{key}.") or name.endswith(f".{key}") for key in kept
        ):
            tensor = find_base_tensor(f"{name}.weight", checkpoint.tensors)
            if tensor:
                yield tensor


def through_nf4(tensor: LazyTensor) -> LazyTensor:
    """`tensor` quantized to NF4 and back. Double quantization needs it whole; the last one is kept."""
    return replace(tensor, dtype="F32", read=lambda start, stop: _LAST.of(tensor)[start:stop].clone())


class _Last:
    """The round trip of the tensor that is being written: its slabs are asked for one by one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tensor: LazyTensor | None = None
        self._values: Any = None

    def of(self, tensor: LazyTensor) -> Any:
        with self._lock:
            if self._tensor is not tensor:
                self._tensor = self._values = None  # before the next, so that memory holds one
                self._values = _round_trip(tensor)
                self._tensor = tensor
            return self._values


_LAST = _Last()


def _round_trip(tensor: LazyTensor) -> Any:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        tensor.load().float(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return functional.dequantize_4bit(packed, state).reshape(tensor.rows, tensor.width)
