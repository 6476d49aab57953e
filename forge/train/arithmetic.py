"""What a layer of the base really computes in: measured on one matrix, never assumed. Runs in a worker.

On a processor with AVX512-BF16, bitsandbytes repacks a 4-bit layer the first time it is used outside
of training and multiplies in bfloat16 from then on, whatever compute type was asked for; the scales
stay rounded to bfloat16 for good. `compute_as_asked` turns that off, so that evaluation, generation
and a validation in the middle of a run see the base which the adapter is trained on.

Not covered: the order of sums, which differs between processors in the last bits of each type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SIZE = 64
# Relative errors of a product of 64 terms: about 1e-7, 3e-4 and 3e-3.
_FLOAT32_ERROR, _FLOAT16_ERROR = 1e-5, 1e-3


@dataclass(frozen=True)
class Arithmetic:
    """The number types that a layer multiplies in: torch's names, or int8."""

    training: str
    evaluation: str


def compute_as_asked(model: Any) -> None:
    """Make every 4-bit layer of `model` (or the layer itself) keep to its compute type on a CPU."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def measured_arithmetic(compute: Any, device: str, *, four_bit: bool) -> Arithmetic:
    """The number type of a product (`float32`, `float16` or `bfloat16`) in training and in evaluation.

    `compute` is the torch dtype that was asked for. A layer of 64 x 64 as `load_base` makes them is
    compared with the float64 product of its own weights.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_SIZE, _SIZE, generator=generator)
    rows = torch.randn(_SIZE, _SIZE, generator=generator)
    layer, kept = _four_bit(weights, compute, device) if four_bit else _plain(weights, compute, device)
    expected = rows.double() @ kept.double().T

    def measured(*, training: bool) -> str:
        with torch.no_grad():
            product = layer.train(training)(rows.to(device, torch.float32 if four_bit else compute))
        return _named((product.cpu().double() - expected).norm() / expected.norm())

    return Arithmetic(measured(training=True), measured(training=False))


def _named(error: float) -> str:
    if error < _FLOAT32_ERROR:
        return "float32"
    return "float16" if error < _FLOAT16_ERROR else "bfloat16"


def _plain(weights: Any, compute: Any, device: str) -> tuple[Any, Any]:
    import torch

    layer = torch.nn.Linear(_SIZE, _SIZE, bias=False, device=device, dtype=compute)
    layer.weight.data.copy_(weights)
    return layer, weights


def _four_bit(weights: Any, compute: Any, device: str) -> tuple[Any, Any]:
    """The layer, and the values that its weights have behind the quantization."""
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.Linear4bit(_SIZE, _SIZE, bias=False, compute_dtype=compute, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weights.clone(), requires_grad=False, quant_type="nf4")
    layer.to(device)
    compute_as_asked(layer)
    kept = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer, kept.to("cpu", torch.float32).reshape(_SIZE, _SIZE)
