"""Whether a file's rows of tokens are those that peft has, one by one. Runs in a worker.

Logits say little of one row among many: a token that alone was trained is rarely sampled, and moves one of a
hundred thousand probabilities. So rows of the embedding and of the output layer are compared themselves:
every one that the adapter changed, where these are few, and a spread of all.

A row is wrong when it is further from peft's than its type's rounding explains, or when what the adapter
changed in it is not there once. A factor that a converter puts into the whole tensor counts as none.

Not covered: tensors without a name in gguf's table, and changes that drown in a coarse type's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.model.gguf_header import GgufTensor
from forge.verify.measurement import RowFit
from forge.verify.rounding import HALVES, rounded
from forge.verify.tensor_values import float32_of
from forge.verify.tuned import Opened

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_SPREAD, _MOST_CHANGED = 512, 4096
_SLACK = 1e-3
"""Of a row's norm: what another order of sums, or a merge in other steps, may move beside the rounding."""
_TIMES = 2.0
"""How often its type's rounding a row may be off; the rounding of one row is even to a few per cent."""
_TIMES_OF_BLOCKS = 4.0
"""The same where the rounding is known from the other rows only: blocks with outliers are 3 times off."""
_SCALE_SLACK, _SURELY = 0.2, 8.0


@dataclass(frozen=True)
class ChangedRows:
    """Rows of one matrix of tokens: `weight` as peft has them, and what of that is `changed` from the base.

    `lies` are the file's tensors that hold it, the first that is there; `ids` say which rows these are.
    """

    lies: Sequence[str]
    ids: Sequence[int]
    weight: Any
    changed: Any


def rows_of(model: Opened, name: str, lies: Sequence[str], weight: Any, added: Any) -> ChangedRows:
    """The rows to look at in the tensor `name`: float32 `weight` (tokens, width), peft's factors `added`."""
    import torch

    count = len(weight)
    spread = torch.linspace(0, count - 1, min(count, _SPREAD)).long()
    base = _of_base(model, name)
    if base is None:
        tuned = weight[spread]
        return ChangedRows(lies, spread.tolist(), tuned, torch.zeros_like(tuned))
    common = min(count, len(base))
    is_changed = torch.ones(count, dtype=torch.bool)
    is_changed[:common] = (weight[:common] != base[:common]).any(dim=1)
    if added is not None:
        is_changed |= added.any(dim=1)
    trained = is_changed.nonzero().flatten()
    steps = torch.linspace(0, len(trained) - 1, min(len(trained), _MOST_CHANGED)).long()
    ids = torch.cat((trained[steps], spread)).unique()
    tuned = weight[ids] if added is None else weight[ids] + added[ids]
    before = torch.zeros_like(tuned)
    before[ids < common] = base[ids[ids < common]]
    return ChangedRows(lies, ids.tolist(), tuned, tuned - before)


def _of_base(model: Opened, name: str) -> Any:
    """What the adapter changed into the tensor `name`; None where it touches it not.

    Of an output layer that the base ties to it, the embedding.
    """
    if not model.is_touched(name):
        return None
    targets = model.loader.targets
    wanted = (targets.get(name, name), *model.of_tokens)
    stored = [name for target in wanted for name in targets if targets[name] == target]
    return model.loader.read(stored[0]) if stored else None


def look_at_rows(
    expected: ChangedRows, tensors: Mapping[str, GgufTensor], raw: Callable[[GgufTensor], Any]
) -> RowFit | None:
    """What the file's rows are; None where it has no tensor of that width."""
    import numpy as np

    tensor = next((tensors[name] for name in expected.lies if name in tensors), None)
    if tensor is None or tensor.shape[1:] != tuple(expected.weight.shape[1:]):
        return None
    ids = np.array(expected.ids)
    there = ids < tensor.shape[0]
    values = float32_of(raw(tensor)[ids[there]], tensor.type)
    weight, changed = expected.weight[there], expected.changed[there]
    wrong = _wrong(values, weight, changed, tensor.type)
    # A padding row that a converter leaves out is nobody's; one that the adapter trained is lost.
    lost = ids[~there][(expected.changed[~there] != 0).any(dim=1).numpy()]
    trained = set(ids[(expected.changed != 0).any(dim=1).numpy()].tolist())
    faulty = sorted({*ids[there][wrong.numpy()].tolist(), *lost.tolist()})
    return RowFit(
        compared=len(ids),
        trained=len(trained),
        wrong=tuple(faulty),
        wrong_trained=tuple(row for row in faulty if row in trained),
    )


def _wrong(values: Any, weight: Any, changed: Any, kind: str) -> Any:
    """Which rows of `values` are not `weight` as the type `kind` holds it: bool, (rows,)."""
    norm = weight.norm(dim=1)
    common = ((values * weight).sum(dim=1) / (norm * norm).clamp_min(1e-30))[norm > 0]
    times = float(common.median()) if len(common) else 1.0
    error = values / (times if times > 0 else 1.0) - weight
    distance = error.norm(dim=1)
    if kind in (*HALVES, "F32"):
        limit = _TIMES * (rounded(weight, kind if kind in HALVES else None) - weight).norm(dim=1)
    else:
        limit = _TIMES_OF_BLOCKS * (distance / norm.clamp_min(1e-30)).median() * norm
    far = ~(distance <= limit + _SLACK * norm + 1e-7 * math.sqrt(weight.shape[1]))
    power = (changed * changed).sum(dim=1)
    share = (error * changed).sum(dim=1) / power.clamp_min(1e-30)
    rest = (error - share[:, None] * changed).norm(dim=1)
    sure = rest / power.sqrt().clamp_min(1e-30) / math.sqrt(weight.shape[1])
    return far | ((power > 0) & (share.abs() > _SCALE_SLACK + _SURELY * sure))
