"""How a file holds each weight, so that the reference can hold it the same way. Runs in a worker.

A conversion cannot be nearer to float32 than its type: the weights are rounded to it, and llama.cpp rounds
what they are multiplied by to it too. The reference rounded in the same places says how much that is on this
model, and what is left between it and the file is the conversion's own error.

Not covered: quantized tensors, which stay as they are (llama.cpp's own file of the type is their yardstick).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.model.checkpoint import Checkpoint
from forge.model.gguf_header import read_gguf
from forge.verify.measurement import Lost

HALVES = ("F16", "BF16")
HALF_STEPS: Mapping[str, float] = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}
"""The most that rounding to a type takes of a number of its range, as a share of it."""


@dataclass(frozen=True)
class RoundedTypes:
    """The types of a GGUF's tensors, by the checkpoint's names.

    `inputs`: what a weight is multiplied by is rounded as the weight is, as llama.cpp does.
    """

    types: Mapping[str, str]
    place: Callable[[str], str | None]
    most: str
    inputs: bool = False

    def type_of(self, name: str, dimensions: int) -> str | None:
        """F16 or BF16, where the file holds the checkpoint's tensor `name` so.

        Of a tensor that the converter joined or split, the file's most frequent type; vectors stay float32.
        """
        kind = self.types.get(self.place(name) or "", self.most if dimensions > 1 else "F32")
        return kind if kind in HALVES else None

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded."""
        return not any(kind in HALVES for kind in self.types.values())


def rounding_of(path: Path, layers: int) -> RoundedTypes:
    """How the GGUF in `path` rounds a model of that many `layers`."""
    header = read_gguf(path)
    types = {name: tensor.type for name, tensor in header.tensors.items()}
    most = next((kind for kind in header.tensor_types if kind != "F32"), "F32")
    return RoundedTypes(types, gguf_names(header.architecture, layers), most)


def rounding_of_checkpoint(checkpoint: Checkpoint) -> RoundedTypes:
    """How a checkpoint rounds its own tensors."""
    types = {name: spec.dtype for name, spec in checkpoint.tensors.items()}
    return RoundedTypes(types, lambda name: name, "F32")


def gguf_names(architecture: str, layers: int) -> Callable[[str], str | None]:
    """From a checkpoint's name to the GGUF's, as llama.cpp's converters have it."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        return lambda name: None
    table = gguf.get_tensor_name_map(kinds[architecture], layers)

    def find(name: str) -> str | None:
        mapped: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
        return mapped

    return find


def most_lost(shares: Mapping[str, float]) -> Lost | None:
    """The tensor that loses most; None of none."""
    name = max(shares, key=lambda name: shares[name], default=None)
    return Lost(name, shares[name]) if name else None


def rounded(values: Any, kind: str | None) -> Any:
    """`values` as `kind` (F16 or BF16) holds them, in float32 again."""
    import torch

    if kind is None:
        return values
    return values.to(torch.float16 if kind == "F16" else torch.bfloat16).to(torch.float32)
