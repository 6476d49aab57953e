"""Base and adapter merged into one checkpoint, tensor by tensor, in float32. Runs in a worker.

The base is the unquantized one (pitfalls 2, 22): W + scale x B A in float32, kept in float32; what
the adapter does not touch is copied in its own type. Checked against peft's own merge in the tests.

Not covered, and refused: DoRA, embeddings with other rows than the base's, an embedding or `lm_head`
of its own on a base that ties the two: training moved one alone, in one tensor both would move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from forge.adapter.read import Adapter, LoraLayer, find_base_tensor
from forge.errors import DataError, Problem
from forge.export.tensors import LazyTensor
from forge.model.checkpoint import Checkpoint
from forge.model.safetensors_header import TensorSpec

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_TIED = "the base ties its output layer to the embedding, which would change with it"


def merged_tensors(checkpoint: Checkpoint, adapter: Adapter | None) -> list[LazyTensor]:
    """Every tensor of the base, those that the adapter touches merged on loading.

    Raises `DataError` that lists every part of the adapter which has no place in the base.
    """
    if adapter is None:
        return [_plain(spec) for spec in checkpoint.tensors.values()]
    deltas, replaced = _match(checkpoint, adapter)
    tensors = []
    for name, spec in checkpoint.tensors.items():
        # peft saves an adapted embedding's own weight beside its factors: the delta goes onto that.
        source = replaced.get(name, spec)
        if name in deltas:
            tensors.append(LazyTensor(name, "F32", spec.shape, _merger(source, deltas[name], adapter)))
        elif name in replaced:
            tensors.append(LazyTensor(name, "F32", spec.shape, _reader(source, float32=True)))
        else:
            tensors.append(_plain(spec))
    return tensors


def _match(
    checkpoint: Checkpoint, adapter: Adapter
) -> tuple[Mapping[str, LoraLayer], Mapping[str, TensorSpec]]:
    problems: list[Problem] = []
    tied = _is_tied(checkpoint)
    deltas: dict[str, LoraLayer] = {}
    replaced: dict[str, TensorSpec] = {}
    for module, layer in adapter.layers.items():
        name = find_base_tensor(f"{module}.weight", checkpoint.tensors)
        if layer.magnitude:
            problems.append(Problem("DoRA cannot be merged by forge yet", module))
        elif name is None:
            problems.append(Problem("the base has no such tensor", f"{module}.weight"))
        elif tied and layer.is_embedding:
            problems.append(Problem(_TIED, module))
        elif checkpoint.tensors[name].shape != _delta_shape(layer, adapter):
            shape = checkpoint.tensors[name].shape
            problems.append(
                Problem(f"{_delta_shape(layer, adapter)} does not fit the base's {shape}", module)
            )
        else:
            deltas[name] = layer
    for given, spec in adapter.replaced.items():
        name = find_base_tensor(given, checkpoint.tensors)
        if name is None:
            problems.append(Problem("the base has no such tensor (is it tied to the embedding?)", given))
        elif tied and name.rpartition(".weight")[0].endswith(_EMBEDDINGS):
            if given.removesuffix(".weight") not in adapter.layers:
                problems.append(Problem(_TIED, given))
        elif checkpoint.tensors[name].shape != spec.shape:
            shape = checkpoint.tensors[name].shape
            problems.append(Problem(f"resized from {shape} to {spec.shape}: not supported yet", given))
        else:
            replaced[name] = spec
    if problems:
        raise DataError(
            f"{len(problems)} parts of the adapter cannot be merged into this base",
            hint="train on the linear layers alone, or merge it with peft and ship that with train: none",
            problems=problems,
        )
    return deltas, replaced


def _is_tied(checkpoint: Checkpoint) -> bool:
    return not any("lm_head" in name or "embed_out" in name for name in checkpoint.tensors)


def _is_transposed(layer: LoraLayer, adapter: Adapter) -> bool:
    return layer.is_embedding or bool(adapter.configuration.get("fan_in_fan_out"))


def _delta_shape(layer: LoraLayer, adapter: Adapter) -> tuple[int, ...]:
    shape = (layer.b.shape[0], layer.a.shape[1])
    return (shape[1], shape[0]) if _is_transposed(layer, adapter) else shape


def _plain(spec: TensorSpec) -> LazyTensor:
    return LazyTensor(spec.name, spec.dtype, spec.shape, _reader(spec))


def _reader(spec: TensorSpec, *, float32: bool = False) -> Callable[[], Any]:
    def read() -> Any:
        import safetensors
        import torch

        with safetensors.safe_open(str(spec.file), framework="pt") as file:
            tensor = file.get_tensor(spec.name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(f"{spec.file.name}: {spec.name} has values that are not finite")
        return tensor.float() if float32 else tensor

    return read


def _merger(spec: TensorSpec, layer: LoraLayer, adapter: Adapter) -> Callable[[], Any]:
    def merge() -> Any:
        weight = _reader(spec, float32=True)()
        delta = _reader(layer.b, float32=True)() @ _reader(layer.a, float32=True)()
        if _is_transposed(layer, adapter):
            delta = delta.T
        return weight.add_(delta, alpha=layer.scale)

    return merge
