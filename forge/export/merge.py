"""Base and adapter merged, slab by slab, in float32. Runs in a worker.

The base is the unquantized one (pitfalls 2, 22): W + scale x B A in float32, kept in float32; what
the adapter does not touch is copied in its own type. Checked against peft's own merge in the tests.

An embedding that was resized has the adapter's rows; rows of single tokens that were trained go over it.

Not covered, and refused: DoRA of an embedding or a Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

from forge.adapter.places import Placed, place
from forge.adapter.read import LoraLayer, TokenRows
from forge.adapter.vocabulary import Fitted
from forge.export.nf4 import through_nf4
from forge.export.tensors import LazyTensor, read_tensor_rows, stored
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
    parts = place(fitted)
    tensors = []
    for name, spec in base.items():
        # peft saves an adapted embedding's own weight beside its factors: the delta goes onto that.
        whole = parts.replaced.get(name)
        tensor = stored(whole, name) if whole else _base(name, spec, nf4)
        if rows := parts.rows.get(name):
            tensor = replace(tensor, dtype="F32", read=_with_rows(tensor, rows))
        if placed := parts.layers.get(name):
            tensor = replace(tensor, dtype="F32", read=_merger(tensor, placed))
        elif whole:
            tensor = replace(tensor, dtype="F32", read=_in_float32(tensor))
        tensors.append(tensor)
    return tensors


def _base(name: str, spec: TensorSpec, nf4: Collection[str]) -> LazyTensor:
    tensor = stored(spec, name)
    return through_nf4(tensor) if name in nf4 else tensor


def _merger(base: LazyTensor, placed: Placed) -> Callable[[int, int], Any]:
    """Rows of W + scale x B A in float32; of the transposed product where the base stores W so."""
    layer = placed.layer
    pieces = _pieces(base, placed)

    def merge(start: int, stop: int) -> Any:
        merged = base.read(start, stop).float()
        for at, left, right in pieces(start, stop):
            merged[at : at + len(left)].addmm_(left, right, alpha=layer.scale)
        if layer.magnitude is None:
            return merged
        # peft's DoRA: each row keeps its direction and gets the learned length.
        lengths = read_tensor_rows(layer.magnitude, 0, 1).float().reshape(-1)[start:stop]
        return merged * (lengths / merged.norm(dim=1)).unsqueeze(1)

    return merge


def _pieces(base: LazyTensor, placed: Placed) -> Callable[[int, int], Iterator[tuple[int, Any, Any]]]:
    """Of rows [start, stop) those with factors of their own: where they begin there, and the two factors."""
    layer, first, rank = placed.layer, placed.first, placed.layer.rank

    def product(expert: int, start: int, stop: int) -> tuple[Any, Any]:
        a = read_tensor_rows(layer.a, expert * rank, (expert + 1) * rank).float()
        own = _columns(layer, expert)
        if placed.transposed:
            return a[:, start:stop].T, _whole(layer.b)[:, own].T
        return read_tensor_rows(layer.b, first + start, first + stop).float()[:, own], a

    def of_all(start: int, stop: int) -> Iterator[tuple[int, Any, Any]]:
        each = base.shape[-2]
        for expert in range(start // each, -(-stop // each)):
            above = expert * each
            begin, end = max(start, above), min(stop, above + each)
            yield (begin - start, *product(expert, begin - above, end - above))

    if layer.experts and placed.expert is None:
        return of_all
    return lambda start, stop: iter([(0, *product(placed.expert or 0, start, stop))])


def _columns(layer: LoraLayer, expert: int) -> slice:
    """Those of B that are the expert's: the experts' columns of one rank lie side by side."""
    return slice(expert, None, layer.experts or 1)


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
    return read_tensor_rows(spec, 0, math.prod(spec.shape[:-1])).float()


def _in_float32(tensor: LazyTensor) -> Callable[[int, int], Any]:
    return lambda start, stop: tensor.read(start, stop).float()
