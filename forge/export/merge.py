"""Base and adapter merged, slab by slab, in float32. Runs in a worker.

The base is the unquantized one (pitfalls 2, 22): W + scale x B A in float32, kept in float32; what
the adapter does not touch is copied in its own type. Checked against peft's own merge in the tests.

An embedding that was resized has the adapter's rows; rows of single tokens that were trained go over it.

Not covered, and refused: DoRA of an embedding or a Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from forge.adapter.read import Adapter, LoraLayer, TokenRows, find_base_tensor
from forge.adapter.vocabulary import Fitted, is_of_tokens
from forge.errors import DataError, Problem
from forge.export.nf4 import through_nf4
from forge.export.tensors import LazyTensor, read_rows, stored
from forge.model.checkpoint import Checkpoint
from forge.model.safetensors_header import TensorSpec


def base_tensors(checkpoint: Checkpoint, *, nf4: Collection[str] = ()) -> list[LazyTensor]:
    """Every tensor of the base; those that `nf4` names go through NF4 and back, as training had them."""
    return [_base(name, spec, nf4) for name, spec in checkpoint.tensors.items()]


def merged_tensors(fitted: Fitted, *, nf4: Collection[str] = ()) -> list[LazyTensor]:
    """Every tensor of the tuned model, those that the adapter touches merged on loading.

    `nf4` names the base's tensors that go through NF4 and back first, as training had them.
    Raises `DataError` that lists every part of the adapter which has no place in the base.
    """
    base = fitted.checkpoint.tensors
    parts = _match(fitted)
    tensors = []
    for name, spec in base.items():
        # peft saves an adapted embedding's own weight beside its factors: the delta goes onto that.
        whole = parts.replaced.get(name)
        tensor = stored(whole, name) if whole else _base(name, spec, nf4)
        if rows := parts.rows.get(name):
            tensor = replace(tensor, dtype="F32", read=_with_rows(tensor, rows))
        if layer := parts.layers.get(name):
            merger = _merger(tensor, layer, transposed=fitted.is_transposed(layer))
            tensor = replace(tensor, dtype="F32", read=merger)
        elif whole:
            tensor = replace(tensor, dtype="F32", read=_in_float32(tensor))
        tensors.append(tensor)
    return tensors


@dataclass(frozen=True)
class _Parts:
    """An adapter's parts by the names of the base's tensors."""

    layers: dict[str, LoraLayer] = field(default_factory=dict)
    replaced: dict[str, TensorSpec] = field(default_factory=dict)
    rows: dict[str, TokenRows] = field(default_factory=dict)

    def shape(self, name: str, base: Mapping[str, TensorSpec]) -> tuple[int, ...]:
        """The shape of the tuned model's tensor."""
        return self.replaced.get(name, base[name]).shape


def _match(fitted: Fitted) -> _Parts:
    base, adapter, parts = fitted.checkpoint.tensors, fitted.adapter, _Parts()
    problems = [*_match_whole(adapter, base, parts), *_match_rows(adapter, base, parts)]
    problems += _match_layers(fitted, base, parts)
    if problems:
        raise DataError(
            f"{len(problems)} parts of the adapter cannot be merged into this base",
            hint="train only on the linear layers, or merge it with peft and ship that with train: none",
            problems=problems,
        )
    return parts


def _match_whole(adapter: Adapter, base: Mapping[str, TensorSpec], parts: _Parts) -> Iterator[Problem]:
    for part, spec in adapter.replaced.items():
        name = find_base_tensor(part, base)
        if name is None:
            yield Problem("the base has no such tensor", part)
        elif base[name].shape != spec.shape and not (
            is_of_tokens(name) and base[name].shape[1:] == spec.shape[1:]
        ):
            yield Problem(f"{spec.shape} does not fit the base's {base[name].shape}", part)
        else:
            parts.replaced[name] = spec


def _match_rows(adapter: Adapter, base: Mapping[str, TensorSpec], parts: _Parts) -> Iterator[Problem]:
    for part, rows in adapter.rows.items():
        name = find_base_tensor(part, base)
        if name is None:
            yield Problem("the base has no such tensor", part)
            continue
        count, *width = parts.shape(name, base)
        if list(rows.values.shape[1:]) != width:
            yield Problem(f"rows of {rows.values.shape[1:]} do not fit the base's {base[name].shape}", part)
        elif max(rows.tokens, default=0) >= count:
            yield Problem(f"token {max(rows.tokens)} has no row, there are {count}", part)
        else:
            parts.rows[name] = rows


def _match_layers(fitted: Fitted, base: Mapping[str, TensorSpec], parts: _Parts) -> Iterator[Problem]:
    for module, layer in fitted.adapter.layers.items():
        transposed = fitted.is_transposed(layer)
        name = find_base_tensor(f"{module}.weight", base)
        if layer.magnitude and transposed:
            yield Problem("DoRA is merged on linear layers only", module)
        elif name is None:
            yield Problem("the base has no such tensor", f"{module}.weight")
        elif (shape := parts.shape(name, base)) != (delta := _delta_shape(layer, transposed)):
            yield Problem(f"{delta} does not fit the base's {shape}", module)
        else:
            parts.layers[name] = layer


def _delta_shape(layer: LoraLayer, transposed: bool) -> tuple[int, ...]:
    shape = (layer.b.shape[0], layer.a.shape[1])
    return (shape[1], shape[0]) if transposed else shape


def _base(name: str, spec: TensorSpec, nf4: Collection[str]) -> LazyTensor:
    tensor = stored(spec, name)
    return through_nf4(tensor) if name in nf4 else tensor


def _merger(base: LazyTensor, layer: LoraLayer, *, transposed: bool) -> Callable[[int, int], Any]:
    """Rows of W + scale x B A in float32; of the transposed product where the base stores W so."""

    def merge(start: int, stop: int) -> Any:
        weight = base.read(start, stop).float()
        if transposed:
            left, right = _columns(layer.a, start, stop).T, _whole(layer.b).T
        else:
            left, right = read_rows(layer.b, start, stop).float(), _whole(layer.a)
        merged = weight.addmm_(left, right, alpha=layer.scale)
        if layer.magnitude is None:
            return merged
        # peft's DoRA: each row keeps its direction and gets the learned length.
        lengths = read_rows(layer.magnitude, 0, 1).float().reshape(-1)[start:stop]
        return merged * (lengths / merged.norm(dim=1)).unsqueeze(1)

    return merge


def _with_rows(tensor: LazyTensor, rows: TokenRows) -> Callable[[int, int], Any]:
    """The tensor in float32 with the rows of tokens in their places."""

    def read(start: int, stop: int) -> Any:
        weight, trained = tensor.read(start, stop).float(), _whole(rows.values)
        for number, token in enumerate(rows.tokens):
            if start <= token < stop:
                weight[token - start] = trained[number]
        return weight

    return read


def _whole(spec: TensorSpec) -> Any:
    return read_rows(spec, 0, math.prod(spec.shape[:-1])).float()


def _columns(spec: TensorSpec, start: int, stop: int) -> Any:
    return _whole(spec)[:, start:stop]


def _in_float32(tensor: LazyTensor) -> Callable[[int, int], Any]:
    return lambda start, stop: tensor.read(start, stop).float()
