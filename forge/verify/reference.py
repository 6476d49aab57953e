"""The reference: transformers' own modules in float32, one decoder layer in memory at a time.

The model is built on the meta device. A hook before each decoder layer reads its weights from the
checkpoint, makes them float32 and adds the adapter; a hook behind it drops them. Embedding, final
norm and head come and go in the same way. So the modules run unchanged, whatever the family, and
the peak is one layer, the embedding and the activations of the sampled rows.

The adapter is added to the weights here by itself: nothing of `export` is used, for it is what is checked.

With `nf4` every linear layer but the head goes through bitsandbytes' NF4 and back first, as QLoRA
holds it in training; the arithmetic stays float32.

Experts, which transformers holds fused, are put together from the checkpoint's.

Not covered, and refused: other checkpoints whose tensors are not named after the modules' parameters,
encoder-decoders, and DoRA of an embedding or a Conv1D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import report
from forge.adapter.read import Adapter, LoraLayer, find_base_tensor
from forge.errors import DataError
from forge.model.checkpoint import open_checkpoint
from forge.model.safetensors_header import TensorSpec
from forge.verify.sample import Sample


@dataclass(frozen=True)
class Weights:
    """Where the reference's weights come from: a checkpoint, with an adapter or without."""

    base: Path
    adapter: Adapter | None = None
    nf4: bool = False
    trust_remote_code: bool = False


def logits(weights: Weights, sample: Sample, label: str) -> Any:
    """Logits at the sampled positions: float32, (positions, vocabulary), in the order of the sample.

    Raises `DataError` for weights that are not finite, not whole, or not those of the modules, and
    for an adapter that has parts without a place.
    """
    import torch

    loader = Loader(weights)
    model = _empty(weights)
    head = model.get_output_embeddings()
    if head is None:
        raise DataError(f"{type(model).__name__} has no output layer: it gives no logits")
    width = max(map(len, sample.rows))
    # Causal: what stands behind a position does not change it, so the padding needs no mask.
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in sample.rows])
    rows = torch.tensor([row for row, _ in sample.positions])
    places = torch.tensor([place for _, place in sample.positions])

    def only_sampled(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0][rows, places].unsqueeze(0), *given[1:])

    with torch.inference_mode(), _streamed(model, loader, label):
        hook = head.register_forward_pre_hook(only_sampled)
        found = model(input_ids=ids, use_cache=False).logits[0].float()
        hook.remove()
    loader.refuse_unused()
    if not torch.isfinite(found).all():
        raise DataError(f"{weights.base}: the logits of the reference are not finite", hint=_DAMAGED)
    return found.numpy()


_DAMAGED = "the checkpoint is damaged, or overflows: load it with transformers and look at its answers"


def _empty(weights: Weights) -> Any:
    """The model without weights; its buffers (rotary frequencies) are computed, not loaded."""
    import accelerate
    import torch
    import transformers

    remote = weights.trust_remote_code
    configuration = transformers.AutoConfig.from_pretrained(weights.base, trust_remote_code=remote)
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(
                configuration, dtype=torch.float32, trust_remote_code=remote
            )
    except (ValueError, KeyError) as error:
        raise DataError(f"transformers cannot run {weights.base}: {error}") from error
    model.tie_weights()
    return model.eval()


@contextmanager
def _streamed(model: Any, loader: Loader, label: str) -> Iterator[None]:
    """Weights come before each unit's forward and go behind it."""
    units = list(_units(model))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    done = 0

    def load(unit: Any, given: Any) -> None:
        for module in unit.modules():
            for key, empty in list(module._parameters.items()):
                if empty is not None and empty.is_meta:
                    linear = _is_quantized_in_training(module, model)
                    module._parameters[key] = loader.parameter(names[id(empty)], empty, linear)

    def drop(unit: Any, given: Any, made: Any) -> None:
        nonlocal done
        done = min(done + 1, len(units))
        report.advance(label, done, len(units))
        for module, kept in empties[id(unit)]:
            module._parameters.update(kept)

    empties = {id(unit): [(one, dict(one._parameters)) for one in unit.modules()] for unit in units}
    hooks = [unit.register_forward_pre_hook(load) for unit in units]
    hooks += [unit.register_forward_hook(drop) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if done < len(units):
            report.advance(label, len(units), len(units))


def _units(model: Any) -> Iterator[Any]:
    """What is loaded at once: each decoder layer, and every module with weights outside of them."""
    layers = set(getattr(model, "_no_split_modules", None) or ())

    def walk(module: Any) -> Iterator[Any]:
        own = any(parameter is not None for parameter in module._parameters.values())
        if own or type(module).__name__ in layers:
            yield module
            return
        for child in module.children():
            yield from walk(child)

    return walk(model)


def _is_quantized_in_training(module: Any, model: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()


# transformers holds all experts of a layer in one parameter; checkpoints have each apart.
_EXPERTS: Mapping[str, Sequence[Sequence[str]]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


class Loader:
    """Reads tensors of a checkpoint in float32, and what the adapter adds to them.

    Raises `DataError` for an adapter with parts that have no place in the checkpoint.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.checkpoint = open_checkpoint(weights.base)
        self._tensors = self.checkpoint.tensors
        adapter = weights.adapter
        self._layers = _by_tensor(adapter.layers, self._tensors) if adapter else {}
        self._replaced = _by_tensor(adapter.replaced, self._tensors, "") if adapter else {}
        self._transposed = bool(adapter and adapter.configuration.get("fan_in_fan_out"))
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
        weight = _read(self._replaced.get(name, self._tensors[name]))
        return nf4_and_back(weight) if nf4 else weight

    def added(self, name: str, weight: Any) -> Any:
        """What the adapter adds to the tensor `name`, whose values are `weight`; None where nothing is."""
        layer = self._layers.get(name)
        return _delta(layer, weight, transposed=self._transposed) if layer else None

    def refuse_unused(self) -> None:
        """Every part of the adapter must have been in the way of the rows."""
        idle = sorted({*self._layers, *self._replaced} - self._used)
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
        raise DataError(f"{spec.file}: {spec.name} has values that are not finite", hint=_DAMAGED)
    return tensor


def _delta(layer: LoraLayer, weight: Any, *, transposed: bool = False) -> Any:
    """What a LoRA layer adds to its `weight`, in float32: scale x B A.

    Of DoRA, what leads from the weight to the sum with each row at its learned length. Raises `DataError`
    for the DoRA of an embedding or a Conv1D.
    """
    product = (_read(layer.b) @ _read(layer.a)).mul_(layer.scale)
    turned = transposed or layer.is_embedding
    if layer.magnitude is None:
        return product.T.contiguous() if turned else product
    if turned:
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
