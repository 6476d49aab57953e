"""What a GGUF's weights are made of: the base, and how many times the adapter. Runs in a worker.

Logits say that something is wrong; the weights say what. Each tensor of the checkpoint is looked up in
the file by gguf's own table of names, and split by least squares: W + f x (adapter's delta) + rest.
f is 1 where the adapter was merged once, 0 where it was not, 8 where its scale was wrong by that;
the rest is the rounding of the file's type, or a sign of another base.

Not covered: tensors that a family's converter splits, joins or computes anew; they are left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from forge import report
from forge.export.nf4 import quantized_in_training
from forge.model.config import Configuration
from forge.model.gguf_header import GgufTensor, read_gguf
from forge.verify import token_rows
from forge.verify.experts import experts
from forge.verify.loader import Weights, nf4_and_back
from forge.verify.measurement import PLUS_ONE, TRANSPOSED, Fits, RowFit
from forge.verify.rounding import HALVES, gguf_names, rounded
from forge.verify.spread import spread
from forge.verify.tensor_values import first_columns, float32_of, raw_rows
from forge.verify.token_rows import EMBEDDING, HEAD, ChangedRows, rows_of
from forge.verify.tuned import open_model

_MOST_ROWS = 16384
"""Of longer matrices (embeddings) the first rows, the last and a spread of the others are looked at: they are
large in float32."""
_NF4_LAYERS = 4
_PART, _PART_COLUMNS = 1 << 18, 256
"""Of an adapter's module at least so many numbers are looked at: beside four bits its share is known to a
hundredth then. The columns are whole blocks of any type."""
_LEAST_ONCE = 0.2
"""How little of an adapter a sound file's rounding leaves at most, for what is counted as once."""
_FACTOR = 0.01
"""By how much a converter's factor differs from 1 at least."""
_FITS = 0.25
"""A rest at which no other order of the rows can fit better: in a wrong one most of them are others."""
_OF_TOKENS = (EMBEDDING, HEAD)
_LEAST_ROWS = 16
_TIMES_OF_THE_MIDDLE, _TIMES_OF_THE_SAME, _ROW_SLACK = 4.0, 2.0, 2e-3
"""How many times the usual rest a row may have, of the middle row's and of the same row's in llama.cpp's own
file, and what of its norm besides: an order of sums, or a merge in other steps."""


@dataclass(frozen=True)
class TensorFit:
    """One tensor: `scale` is f (None where nothing is adapted), `rest` relative to the weight's norm.

    `rest_nf4` is the rest over the base's NF4 round trip. `layout`: how its rows are ordered in the
    file. `lost_rows`: rows which the file lacks, or has as zeros where the checkpoint does not. `sure`: how
    far f can be off by the rounding. `touched`: the values are the adapter's, by factors or whole. Of a
    matrix of the type `kind`, by row (`numbers`): the rest's norm and the weight's, `row_rests` and
    `row_norms`.
    """

    gguf: str
    scale: float | None
    rest: float
    layout: str
    rest_nf4: float | None = None
    lost_rows: int = 0
    sure: float = 0.0
    touched: bool = False
    kind: str = ""
    numbers: Any = None
    row_rests: Any = None
    row_norms: Any = None


@dataclass(frozen=True)
class _Looked:
    """A tensor's fit, its values in the checkpoint's order, and what they are of: as far as was looked at."""

    fit: TensorFit
    arranged: Any
    weight: Any
    added: Any


def fit_weights(
    files: Sequence[Path], source: Weights, facts: Configuration, also: Collection[str] = ()
) -> tuple[Fits, ...]:
    """Of each GGUF: tensors that can be looked up, and in sum: scale, rest, what it has no place for.

    Those that the adapter touches, a spread of the others and `also`. A third file is llama.cpp's own of the
    first one's type. A tensor of the checkpoint and what the adapter adds to it are read once for all files.
    """
    model = open_model(source)
    checkpoint = model.loader.checkpoint
    by_training = quantized_in_training(source.base, checkpoint) if source.nf4 else frozenset()
    opened = [_File(path, facts) for path in files]
    names = model.tensors
    looked_up = [
        name for name in names if model.is_looked_up(name) and any(file.place(name) for file in opened)
    ]
    chosen = [*spread(looked_up), *(name for name in looked_up if opened[0].place(name) in also)]
    # Of an adapter every module, a part of it at least: it may be missing in one.
    others = [name for name in looked_up if model.is_touched(name) and name not in chosen]
    chosen = [*dict.fromkeys(chosen), *others]
    adapted = 0
    for number, name in enumerate(chosen):
        weight = model.read(name, nf4=name in by_training)
        added = model.added(name, weight)
        adapted += added is not None
        with_nf4 = added is not None and not source.nf4 and adapted <= _NF4_LAYERS
        touched, whole = model.is_touched(name), number < len(chosen) - len(others)
        _look_at(opened, name, weight, added, with_nf4=with_nf4, touched=touched, whole=whole)
        for file in opened:
            for lies in _of_tokens(file, name, names) if weight.dim() == 2 else ():
                file.look_at_rows(rows_of(model, name, lies, weight, added))
        report.advance("look at the weights", number + 1, len(chosen))
    for name, weight, added in experts(model):
        _look_at(opened, name, weight, added, with_nf4=False, touched=True, whole=True)
    beside = {fit.gguf: fit for fit in opened[-1].fits} if len(opened) > 1 else {}
    odd = {fit.gguf: rows for fit in opened[0].fits if (rows := odd_rows(fit, beside.get(fit.gguf)))}
    fits = [replace(_summed(file.fits, file.missing), rows=file.rows, shares=file.shares) for file in opened]
    return (replace(fits[0], odd_rows=odd), *fits[1:])


def _look_at(
    opened: Sequence[_File],
    name: str,
    weight: Any,
    added: Any,
    *,
    with_nf4: bool,
    touched: bool,
    whole: bool,
) -> None:
    """Look at one tensor in each file, and whether an adapter is there as often as in a sound one."""
    looked = [
        file.look_at(name, weight, added, with_nf4=with_nf4, touched=touched, whole=whole) for file in opened
    ]
    for file, looked_at in zip(opened, looked, strict=True):
        if looked_at is None or looked_at.fit.scale is None:
            continue
        if looked_at.fit.kind in (*HALVES, "F32"):
            sound, once = _as_held(looked_at), 1.0
        elif len(looked) > 2 and (own := looked[2]) and _are_alike(own, looked_at):
            sound, once = own.arranged, min(1.0, max(own.fit.scale or 0.0, _LEAST_ONCE))
        else:
            continue
        share, error = _share(looked_at, sound)
        file.shares[looked_at.fit.gguf] = (round(share / once, 6), round(error / once, 6))


def _are_alike(looked_at: _Looked, other: _Looked) -> bool:
    return looked_at.fit.layout == other.fit.layout and looked_at.arranged.shape == other.arranged.shape


def _as_held(looked_at: _Looked) -> Any:
    """What peft has of a tensor, as the file's type holds it; a converter's factor is put to it."""
    tuned, arranged = looked_at.weight + looked_at.added, looked_at.arranged
    times = float((arranged * tuned).sum() / (tuned * tuned).sum().clamp_min(1e-30))
    kind = looked_at.fit.kind
    return rounded(tuned if abs(times - 1) < _FACTOR else times * tuned, kind if kind in HALVES else None)


def _share(looked_at: _Looked, sound: Any) -> tuple[float, float]:
    """How much more of the adapter is in a tensor than in a `sound` one, and the standard error of that.

    llama.cpp's own tensor hides as much of the change by its rounding. What lies along the weight itself is
    not counted: quantizers stretch it. Rows are independent of each other, numbers of one block are not.
    """
    weight, added = looked_at.weight, looked_at.added
    along = added - (added * weight).sum() / (weight * weight).sum().clamp_min(1e-30) * weight
    along, error = (values.reshape(-1, weight.shape[-1]) for values in (along, looked_at.arranged - sound))
    power, products = (along * along).sum(dim=1), (error * along).sum(dim=1)
    whole = max(float(power.sum()), 1e-30)
    share = float(products.sum()) / whole
    rest = float((error - share * along).norm()) / math.sqrt(whole * error.numel())
    return share, max(float((products - share * power).norm()) / whole, rest)


def odd_rows(fit: TensorFit, beside: TensorFit | None) -> tuple[int, ...]:
    """Rows of a file's matrix that are off by more than their type's rounding: damaged, or another row's.

    What that is says llama.cpp's own file, row by row, where that tensor has the same type there, and of
    unquantized tensors the middle row. Others are not judged.
    """
    import numpy as np

    if fit.row_rests is None or len(fit.row_rests) < _LEAST_ROWS:
        return ()
    norms = fit.row_norms
    if fit.kind in (*HALVES, "F32"):
        usual = _TIMES_OF_THE_MIDDLE * np.median(fit.row_rests / np.maximum(norms, 1e-30)) * norms
    elif beside is not None and _is_alike(fit, beside):
        times = max(1.0, float(np.median(fit.row_rests / np.maximum(beside.row_rests, 1e-30))))
        usual = _TIMES_OF_THE_SAME * times * beside.row_rests
    else:
        return ()
    slack = _ROW_SLACK * np.maximum(norms, np.median(norms))
    return tuple(fit.numbers[fit.row_rests > usual + slack].tolist())


def _is_alike(fit: TensorFit, beside: TensorFit) -> bool:
    """Whether two files have the same rows of a matrix in the same type: one may lack rows of tokens."""
    import numpy as np

    in_type = beside.kind == fit.kind and beside.layout == fit.layout
    return in_type and np.array_equal(beside.numbers, fit.numbers)


def _of_tokens(file: _File, name: str, names: Sequence[str]) -> Sequence[tuple[str, ...]]:
    """Where the file has the rows of tokens of the checkpoint's `name`, one of `names`; mostly nowhere.

    llama.cpp takes the embedding for an output layer that a file lacks. One that the checkpoint lacks is the
    embedding.
    """
    place = file.place(name)
    if place == HEAD:
        return ((HEAD, EMBEDDING),)
    if place != EMBEDDING:
        return ()
    has_head = any(file.place(name) == HEAD for name in names)
    return ((EMBEDDING,),) if has_head else ((EMBEDDING,), (HEAD,))


class _File:
    """A GGUF's tensors by the checkpoint's names, and what was found of them."""

    def __init__(self, path: Path, facts: Configuration) -> None:
        header = read_gguf(path)
        self._facts, self._path, self._tensors = facts, path, header.tensors
        self.place = gguf_names(header.architecture, facts.layers or 0)
        self.fits: list[TensorFit] = []
        self.missing: list[str] = []
        self.rows: dict[str, RowFit] = {}
        self.shares: dict[str, tuple[float, float]] = {}

    def look_at(
        self, name: str, weight: Any, added: Any, *, with_nf4: bool, touched: bool, whole: bool
    ) -> _Looked | None:
        """Keep the fit of the tensor that the checkpoint calls `name`, or that it is missing.

        Where not the `whole` is needed, of some of its columns if these fit.
        """
        place = self.place(name)
        if place and place in self._tensors:
            tensor = self._tensors[place]
            raw = raw_rows(self._path, tensor)
            looked = None
            if not whole and _any(added) and weight.dim() == 2 and tensor.shape == tuple(weight.shape):
                width = _PART_COLUMNS * math.ceil(_PART / _PART_COLUMNS / len(weight))
                part = first_columns(raw, tensor.type, width)
                looked = _fit(tensor, part, weight[:, :width], added[:, :width], self._facts, with_nf4)
            if looked is None or looked.fit.rest >= _FITS:
                looked = _fit(tensor, raw, weight, added, self._facts, with_nf4)
            self.fits += [replace(looked.fit, touched=touched)] if looked else []
            return looked
        if place:
            self.missing.append(name)
        return None

    def look_at_rows(self, expected: ChangedRows) -> None:
        """Keep which of the `expected` rows of tokens are not those of the file."""
        if fit := token_rows.look_at_rows(expected, self._tensors, partial(raw_rows, self._path)):
            self.rows[expected.lies[0]] = fit


def _fit(
    tensor: GgufTensor, raw: Any, weight: Any, added: Any, facts: Configuration, with_nf4: bool
) -> _Looked | None:
    import numpy as np

    rows, lost = slice(None), 0
    shape = tensor.shape
    if tensor.name in _OF_TOKENS and shape[0] < weight.shape[0] and shape[1:] == weight.shape[1:]:
        lost = weight.shape[0] - shape[0]
        weight, added = weight[: shape[0]], None if added is None else added[: shape[0]]
    if weight.dim() == 2 and weight.shape[0] > _MOST_ROWS and shape == tuple(weight.shape):
        last, spread_out = len(weight) - 1, np.linspace(0, len(weight) - 1, _MOST_ROWS // 2, dtype=int)
        rows = np.unique(np.r_[0:4096, spread_out, last - 4095 : last + 1])
        weight, added = weight[rows], None if added is None else added[rows]
    values = float32_of(raw[rows], tensor.type)
    fits, norm = [], weight.norm().clamp_min(1e-30)
    for layout, arranged in _layouts(values, weight, facts):
        error = arranged - weight
        scale = float((error * added).sum() / (added * added).sum()) if _any(added) else None
        rest = error - scale * added if scale is not None else error
        fits.append((float(rest.norm() / norm), layout, scale, arranged))
        if weight.dim() > 1 and fits[-1][0] < _FITS:
            break
    if not fits:
        return None
    rest, layout, scale, arranged = min(fits, key=lambda candidate: candidate[0])
    rest_nf4 = None
    if with_nf4 and scale is not None and weight.dim() == 2:
        other = arranged - nf4_and_back(weight)
        share = float((other * added).sum() / (added * added).sum())
        rest_nf4 = float((other - share * added).norm() / weight.norm())
    if weight.dim() == 2:
        lost += int(((arranged.abs().sum(dim=1) == 0) & (weight.abs().sum(dim=1) > 0)).sum())
    # By chance the rounding lies along the adapter's change: less so the more values there are.
    sure = (
        rest * float(weight.norm() / added.norm()) / math.sqrt(weight.numel()) if scale is not None else 0.0
    )
    rests = norms = numbers = None
    if weight.dim() > 1:
        left = arranged - weight if scale is None else arranged - weight - scale * added
        rests, norms = (values.reshape(-1, values.shape[-1]).norm(dim=1).numpy() for values in (left, weight))
        numbers = np.arange(len(rests)) if isinstance(rows, slice) else rows
    fit = TensorFit(
        tensor.name,
        scale,
        rest,
        layout,
        rest_nf4,
        lost,
        sure,
        kind=tensor.type,
        numbers=numbers,
        row_rests=rests,
        row_norms=norms,
    )
    return _Looked(fit, arranged, weight, added)


def _any(added: Any) -> bool:
    return added is not None and bool(added.any())


def _layouts(values: Any, weight: Any, facts: Configuration) -> Iterator[tuple[str, Any]]:
    """The file's tensor in the checkpoint's order of rows, in every way that converters use."""
    if values.shape == weight.shape:
        yield "plain", values
        if weight.dim() == 1:
            yield PLUS_ONE, values - 1.0  # Gemma's norms
        heads = {facts.heads, facts.key_value_heads} - {None}
        for count in sorted(count for count in heads if count and weight.shape[0] % (2 * count) == 0):
            # Llama's rotary halves, interleaved head by head.
            split = values.reshape(count, weight.shape[0] // count // 2, 2, *weight.shape[1:])
            yield f"interleaved by {count} heads", split.swapaxes(1, 2).reshape(weight.shape)
    if weight.dim() == 2 and values.shape == weight.T.shape:
        yield TRANSPOSED, values.T


def _summed(fits: Sequence[TensorFit], missing: Sequence[str]) -> Fits:
    scales = [fit.scale for fit in fits if fit.scale is not None]
    adapted = [fit.rest for fit in fits if fit.scale is not None]
    nf4 = [fit.rest_nf4 for fit in fits if fit.rest_nf4 is not None]
    beside = [fit.rest for fit in fits if fit.rest_nf4 is not None]
    return Fits(
        scale=statistics.median(scales) if scales else None,
        rest=statistics.median(adapted) if adapted else None,
        rest_nf4=statistics.median(nf4) if nf4 else None,
        rest_beside_nf4=statistics.median(beside) if beside else None,
        adapted=tuple(fit.gguf for fit in fits if fit.scale is not None),
        touched=tuple(fit.gguf for fit in fits if fit.touched),
        missing=tuple(missing),
        scales={fit.gguf: (round(fit.scale, 4), fit.sure) for fit in fits if fit.scale is not None},
        lost_rows={fit.gguf: fit.lost_rows for fit in fits if fit.lost_rows},
        layouts={fit.gguf: fit.layout for fit in fits},
        rests={fit.gguf: round(fit.rest, 6) for fit in fits},
    )
