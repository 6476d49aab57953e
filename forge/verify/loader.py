"""A checkpoint's tensors in float32, by the names that transformers gives them. Runs in a worker.

Nothing of `export` or of `adapter.read` is used, for they are what is checked: which tensors of the
checkpoint make a parameter, and how, is transformers' own conversion (renamed prefixes of multimodal
models, experts that it holds fused). What an adapter does is peft's, in `tuned`.

With `nf4` every linear layer but the head goes through bitsandbytes' NF4 and back, as QLoRA holds it
in training.

Not covered, and refused: checkpoints whose tensors transformers does not know.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.errors import DataError
from forge.model.checkpoint import Checkpoint, open_checkpoint
from forge.model.safetensors_header import TensorSpec
from forge.verify.rounding import HALVES, RoundedTypes, rounded

DAMAGED = "the checkpoint is damaged, or overflows: load it with transformers and look at its answers"


@dataclass(frozen=True)
class Weights:
    """Where the reference's weights come from: a checkpoint, with the adapter in a directory or without.

    `plain`: nothing of the adapter but the rows that it added to the embedding. `rounding`: how a file
    holds the tensors, the adapter merged into them, or `beside` them in float32.
    """

    base: Path
    adapter: Path | None = None
    nf4: bool = False
    trust_remote_code: bool = False
    plain: bool = False
    rounding: RoundedTypes | None = None
    beside: bool = False


@dataclass
class _Place:
    """The tensors of the checkpoint that make one parameter, and what puts them together."""

    converter: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)
    """(the converter's pattern, the tensor's name)"""


class Loader:
    """Reads parameters of `model`, which has none, out of the checkpoint of `weights`."""

    def __init__(self, weights: Weights, model: Any) -> None:
        self._weights, self._model = weights, model
        self.checkpoint = open_checkpoint(weights.base)
        self._places, self._produced = _places(model, self.checkpoint)
        self.targets: Mapping[str, str] = {
            place.sources[0][1]: name for name, place in self._places.items() if place.converter is None
        }
        """The parameter's name by the tensor's, where one is the other."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint has the parameter `name`."""
        return name in self._places or name in self._produced

    def parameter(self, names: Sequence[str], shape: Sequence[int], linear: bool) -> Any:
        """The parameter that has all of `names` (tied ones), as float32.

        Raises `DataError` where the checkpoint lacks it, has it in another shape or not finite.
        """
        name = next((name for name in names if self.has(name)), None)
        if name is None:
            raise DataError(
                f"{self._weights.base}: no tensor for {names[0]}: transformers does not know how this "
                "checkpoint's tensors are named",
                hint="the token ids, the prompt and the server are still compared",
            )
        weight = self._make(name)
        if tuple(weight.shape) != tuple(shape):
            raise DataError(f"{self._weights.base}: {name} is {tuple(weight.shape)}, not {tuple(shape)}")
        return nf4_and_back(weight) if linear and self._weights.nf4 else weight

    def read(self, name: str, *, nf4: bool = False) -> Any:
        """The checkpoint's tensor `name`."""
        weight = read_float32(self.checkpoint.tensors[name])
        return nf4_and_back(weight) if nf4 else weight

    def _make(self, name: str) -> Any:
        place = self._places.get(name) or self._places[self._produced[name]]
        if place.converter is None:
            return self.read(place.sources[0][1])
        converter = copy.deepcopy(place.converter)
        for pattern, source in place.sources:
            converter.collected_tensors[pattern].append(self.read(source))
        target = name if name in self._places else self._produced[name]
        return converter.convert(target, model=self._model, config=self._model.config)[name].contiguous()


def _places(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, _Place], dict[str, str]]:
    """By parameter: what it is made of; and the parameters that are made along with another, by its name.

    As transformers' `convert_and_load_state_dict_in_model` sorts a checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    known, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [change for change in mapping if isinstance(change, WeightRenaming)]
    converters = [change for change in mapping if isinstance(change, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    places: dict[str, _Place] = {}
    produced: dict[str, str] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:
            continue  # a tensor of another part, or none of this architecture's
        place = places.setdefault(name, _Place())
        if pattern is None:
            places[name] = _Place(None, [("", key)])
            continue
        place.converter = by_pattern[pattern]
        place.sources.append((pattern, key))
        first, *others = place.converter.target_patterns
        produced |= {name.replace(first, other): name for other in others}
    return places, produced


def read_float32(spec: TensorSpec) -> Any:
    """A tensor of a safetensors file in float32; raises `DataError` when it is not finite."""
    import safetensors
    import torch

    with safetensors.safe_open(str(spec.file), framework="pt") as file:
        tensor = file.get_tensor(spec.name).to(torch.float32, copy=True)
    # A sum is finite only where all are; it may overflow, and is an eighth of the work of looking at each.
    if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise DataError(f"{spec.file}: {spec.name} has values that are not finite", hint=DAMAGED)
    return tensor


def changes_nothing(rounding: RoundedTypes, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's own values are those that the file's types hold, as most bfloat16 ones are."""
    import torch

    kinds = [kind for kind in HALVES if kind in rounding.types.values()]
    for name, spec in checkpoint.tensors.items():
        wanted = [kind for kind in kinds if kind != spec.dtype]
        if not wanted or (len(spec.shape) < 2 and rounding.type_of(name, len(spec.shape)) is None):
            continue
        values = read_float32(spec)
        if not all(torch.equal(values, rounded(values, kind)) for kind in wanted):
            return False
    return True


def nf4_and_back(weight: Any) -> Any:
    """The values that NF4 with double quantization gives back for `weight`."""
    import bitsandbytes.functional as nf4

    packed, state = nf4.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return nf4.dequantize_4bit(packed, state).reshape(weight.shape)
