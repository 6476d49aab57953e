"""How large the change is that factors make, without the matrix that they stand for. Runs in a worker.

A change is a sum of products scale x B A. Stacked, the sum is one product of two long thin matrices, and the
small matrix between their orthogonal parts (QR) has its singular values: its norm, and what the best
approximation of a rank would lose. In float64, so that two sums can be compared to float32's last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from forge.adapter.read import LoraLayer
from forge.model.safetensors_header import TensorSpec

Term = tuple[float, LoraLayer]
"""A weight, and the layer whose change it scales."""


def singular_values(terms: Sequence[Term]) -> tuple[float, ...]:
    """Those of the sum of `terms`, all layers of one module, the largest first."""
    import torch

    outer = torch.cat([_read(layer.b) * (weight * layer.scale) for weight, layer in terms], dim=1)
    inner = torch.cat([_read(layer.a) for _, layer in terms], dim=0)
    core = torch.linalg.qr(outer).R @ torch.linalg.qr(inner.T).R.T
    return tuple(torch.linalg.svdvals(core).tolist())


def norm(values: Sequence[float]) -> float:
    """The Frobenius norm of the matrix that has these singular values."""
    return math.sqrt(math.fsum(value * value for value in values))


def _read(spec: TensorSpec) -> Any:
    import safetensors

    with safetensors.safe_open(str(spec.file), framework="pt") as file:
        return file.get_tensor(spec.name).double()
