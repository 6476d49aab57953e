"""Base and adapter merged, slab by slab, in float32. Runs in a worker.

The base is the unquantized one (pitfalls 2, 22): W + scale x B A in float32, kept in float32; what
the adapter does not touch is copied in its own type. Checked against peft's own merge in the tests.

Not covered, and refused: DoRA of an embedding or a Conv1D, embeddings with other rows than the base's,
an embedding or `lm_head` of its own on a base that ties the two: training moved one alone, in one tensor
both would move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from forge.adapter.read import EMBEDDINGS, Adapter, LoraLayer, find_base_tensor
from forge.errors import DataError, Problem
from forge.export.nf4 import through_nf4
from forge.export.tensors import LazyTensor, read_rows, stored
from forge.model.checkpoint import Checkpoint
from forge.model.safetensors_header import TensorSpec

_TIED = "the base ties its output layer to the embedding, which would change with it"


def merged_tensors(
    checkpoint: Checkpoint, adapter: Adapter | None, *, nf4: Collection[str] = ()
) -> list[LazyTensor]:
    """Every tensor of the base, those that the adapter touches merged on loading.

    `nf4` names the base's tensors that go through NF4 and back first, as training had them.
    Raises `DataError` that lists every part of the adapter which has no place in the base.
    """
    if adapter is None:
        return [_base(spec, nf4) for spec in checkpoint.tensors.values()]
    deltas, replaced = _match(checkpoint, adapter)
    tensors = []
    for name, spec in checkpoint.tensors.items():
        # peft saves an adapted embedding's own weight beside its factors: the delta goes onto that.
        source = stored(replaced[name]) if name in replaced else _base(spec, nf4)
        if name in deltas:
            layer = deltas[name]
            merger = _merger(source, layer, transposed=_is_transposed(layer, adapter))
            tensors.append(LazyTensor(name, "F32", spec.shape, merger))
        elif name in replaced:
            tensors.append(LazyTensor(name, "F32", spec.shape, _in_float32(source)))
        else:
            tensors.append(source)
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
        if layer.magnitude and _is_transposed(layer, adapter):
            problems.append(Problem("DoRA is merged on linear layers alone", module))
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
        elif tied and name.rpartition(".weight")[0].endswith(EMBEDDINGS):
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


def _base(spec: TensorSpec, nf4: Collection[str]) -> LazyTensor:
    return through_nf4(stored(spec)) if spec.name in nf4 else stored(spec)


def _merger(base: LazyTensor, layer: LoraLayer, *, transposed: bool) -> Callable[[int, int], Any]:
    """Rows of W + scale x B A in float32; of the transposed product where the base stores W so."""

    def merge(start: int, stop: int) -> Any:
        weight = base.read(start, stop).float()
        if transposed:
            b, a = _whole(layer.b), _columns(layer.a, start, stop)
            delta = a.T @ b.T
        else:
            b, a = read_rows(layer.b, start, stop).float(), _whole(layer.a)
            delta = b @ a
        merged = weight.add_(delta, alpha=layer.scale)
        if layer.magnitude is None:
            return merged
        # peft's DoRA: each row keeps its direction and gets the learned length.
        lengths = read_rows(layer.magnitude, 0, 1).float().reshape(-1)[start:stop]
        return merged * (lengths / merged.norm(dim=1)).unsqueeze(1)

    return merge


def _whole(spec: TensorSpec) -> Any:
    return read_rows(spec, 0, math.prod(spec.shape[:-1])).float()


def _columns(spec: TensorSpec, start: int, stop: int) -> Any:
    return _whole(spec)[:, start:stop]


def _in_float32(tensor: LazyTensor) -> Callable[[int, int], Any]:
    return lambda start, stop: tensor.read(start, stop).float()
