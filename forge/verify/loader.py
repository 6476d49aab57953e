"""The reference's weights: a checkpoint's tensors in float32, the adapter added. Runs in a worker.

The adapter is added here by itself: nothing of `export` is used, for it is what is checked.

With `nf4` every linear layer but the head goes through bitsandbytes' NF4 and back first, as QLoRA
holds it in training.

Experts, which transformers holds fused, are put together from the checkpoint's.

Not covered, and refused: other checkpoints whose tensors are not named after the modules' parameters,
and DoRA of an embedding or a Conv1D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.adapter.read import Adapter, LoraLayer, find_base_tensor
from forge.adapter.vocabulary import Fitted, fit
from forge.errors import DataError
from forge.model.checkpoint import open_checkpoint
from forge.model.safetensors_header import TensorSpec

DAMAGED = "the checkpoint is damaged, or overflows: load it with transformers and look at its answers"
# transformers holds all experts of a layer in one parameter; checkpoints have each apart.
_EXPERTS: Mapping[str, Sequence[Sequence[str]]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Weights:
    """Where the reference's weights come from: a checkpoint, with an adapter or without.

    `plain`: nothing of the adapter but the rows that it added to the embedding.
    """

    base: Path
    adapter: Adapter | None = None
    nf4: bool = False
    trust_remote_code: bool = False
    plain: bool = False


class Loader:
    """Reads tensors of a checkpoint in float32, and what the adapter adds to them.

    Raises `DataError` for an adapter with parts that have no place in the checkpoint, or one too many.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        base = open_checkpoint(weights.base)
        self.fitted: Fitted | None = fit(weights.adapter, base) if weights.adapter else None
        adapter = self.fitted.adapter if self.fitted else None
        self.checkpoint = self.fitted.checkpoint if self.fitted else base
        self._tensors = self.checkpoint.tensors
        tuned = None if weights.plain else adapter
        self._layers = _by_tensor(tuned.layers, self._tensors) if tuned else {}
        self._replaced = _by_tensor(adapter.replaced, self._tensors, "") if adapter else {}
        self._token_rows = _by_tensor(tuned.rows, self._tensors, "") if tuned else {}
        self._used: set[str] = set()

    def parameter(self, names: Sequence[str], empty: Any, linear: bool) -> Any:
        import torch

        weight = self._find(names, empty.shape[0], linear)
        if weight is None:
            raise DataError(
                f"{self._weights.base}: no tensor for {names[0]}: this family's checkpoint is not "
                "named after its modules, which the streamed reference cannot run yet",
                hint="the token ids, the prompt and the server are still compared",
            )
        if weight.shape != empty.shape:
            raise DataError(
                f"{self._weights.base}: {names[0]} is {tuple(weight.shape)}, not {tuple(empty.shape)}"
            )
        return torch.nn.Parameter(weight, requires_grad=False)

    def _find(self, names: Sequence[str], count: int, linear: bool) -> Any:
        """The parameter of one of `names`; `count` experts are put together where it is theirs."""
        import torch

        for name in (*names, *(name.replace(".mlp.", ".block_sparse_moe.") for name in names)):
            if found := find_base_tensor(name, self._tensors):
                return self._weight(found, linear)
            block, _, part = name.rpartition(".experts.")
            for members in _EXPERTS.get(part, ()):
                parts = [[f"{block}.experts.{n}.{one}.weight" for one in members] for n in range(count)]
                if parts[0][0] in self._tensors:
                    return torch.stack([torch.cat([self._weight(one, False) for one in of]) for of in parts])
        return None

    def _weight(self, name: str, linear: bool) -> Any:
        """One tensor of the checkpoint, the adapter added."""
        self._used.add(name)
        weight = self.read(name, nf4=linear and self._weights.nf4)
        added = self.added(name, weight)
        return weight if added is None else weight.add_(added)

    def read(self, name: str, *, nf4: bool = False) -> Any:
        """The tensor `name` without what is added to it: the checkpoint's, or the adapter's whole one."""
        if self._weights.plain:
            return nf4_and_back(self._resized(name)) if nf4 else self._resized(name)
        weight = _read(self._replaced.get(name, self._tensors[name]))
        if trained := self._token_rows.get(name):
            weight[list(trained.tokens)] = _read(trained.values)
        return nf4_and_back(weight) if nf4 else weight

    def _resized(self, name: str) -> Any:
        """The checkpoint's tensor, with the rows of the adapter that it lacks, or without those it lost."""
        own, whole = _read(self._tensors[name]), self._replaced.get(name)
        if whole is None or whole.shape[:1] == tuple(own.shape[:1]):
            return own
        weight = _read(whole)
        count = min(weight.shape[0], own.shape[0])
        weight[:count] = own[:count]
        return weight

    def added(self, name: str, weight: Any) -> Any:
        """What the adapter adds to the tensor `name`, whose values are `weight`; None where nothing is."""
        layer = self._layers.get(name)
        if layer is None or self.fitted is None:
            return None
        return _delta(layer, weight, transposed=self.fitted.is_transposed(layer))

    def refuse_unused(self) -> None:
        """Every part of the adapter must have been in the way of the rows."""
        idle = sorted({*self._layers, *self._replaced, *self._token_rows} - self._used)
        if idle:
            raise DataError(f"{len(idle)} parts of the adapter are in no layer that ran: {idle[0]}")


def _by_tensor(
    parts: Mapping[str, Any], tensors: Mapping[str, TensorSpec], end: str = ".weight"
) -> dict[str, Any]:
    named = {find_base_tensor(f"{name}{end}", tensors): part for name, part in parts.items()}
    if None in named:
        lost = [name for name in parts if find_base_tensor(f"{name}{end}", tensors) is None]
        raise DataError(
            f"the adapter was made for another base: {len(lost)} of its parts have no place, "
            f"such as {lost[0]}",
            hint="name the base that it was trained on",
        )
    return {name: part for name, part in named.items() if name}


def _read(spec: TensorSpec) -> Any:
    """A tensor of a safetensors file in float32; raises `DataError` when it is not finite."""
    import safetensors
    import torch

    with safetensors.safe_open(str(spec.file), framework="pt") as file:
        tensor = file.get_tensor(spec.name).to(torch.float32, copy=True)
    if not torch.isfinite(tensor).all():
        raise DataError(f"{spec.file}: {spec.name} has values that are not finite", hint=DAMAGED)
    return tensor


def _delta(layer: LoraLayer, weight: Any, *, transposed: bool) -> Any:
    """What a LoRA layer adds to its `weight`, in float32: scale x B A.

    Of DoRA, what leads from the weight to the sum with each row at its learned length. Raises `DataError`
    for the DoRA of an embedding or a Conv1D.
    """
    product = (_read(layer.b) @ _read(layer.a)).mul_(layer.scale)
    if layer.magnitude is None:
        return product.T.contiguous() if transposed else product
    if transposed:
        raise DataError(
            f"{layer.module}: the reference covers DoRA on linear layers alone",
            hint="train it as a plain LoRA, or on the linear layers",
        )
    merged = product.add_(weight)
    lengths = _read(layer.magnitude).reshape(-1) / merged.norm(dim=1)
    return merged.mul_(lengths.unsqueeze(1)).sub_(weight)


def nf4_and_back(weight: Any) -> Any:
    """The values that NF4 with double quantization gives back for `weight`."""
    import bitsandbytes.functional as nf4

    packed, state = nf4.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return nf4.dequantize_4bit(packed, state).reshape(weight.shape)
