"""Proof that packed rows do not see each other in this model. Runs in a worker.

Whether a family keeps to the position ids depends on its attention and on code of transformers that
differs between families, so it is measured on the rows themselves before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forge.errors import DataError

_LONGEST = 64
# Relative to the largest logit. Rounding of 16-bit and quantized layers stays below, a leak does not.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}


def refuse_leaks(model: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `DataError` when a row's logits change with the row that is packed before it."""
    difference, largest, dtype = packed_difference(model, [row["input_ids"][:_LONGEST] for row in rows[:2]])
    if not difference <= _TOLERANCE[dtype] * largest:
        raise DataError(
            "train.packing: this base lets packed rows see each other: the logits of a row change by "
            f"{difference:.3g} with the row before it",
            hint="leave train.packing out; train.length_groups saves padding too",
        )


def packed_difference(model: Any, rows: Sequence[Sequence[int]]) -> tuple[float, float, str]:
    """Largest difference of logits packed and apart, the largest logit, and their number type."""
    import torch

    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    boundaries = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(map(len, rows))
    try:
        with torch.no_grad():
            packed = model(
                input_ids=torch.tensor([[token for row in rows for token in row]], device=device),
                position_ids=torch.tensor([[at for row in rows for at in range(len(row))]], device=device),
                cu_seq_lens_q=boundaries,
                cu_seq_lens_k=boundaries,
                max_length_q=longest,
                max_length_k=longest,
                use_cache=False,
            ).logits[0]
            apart = torch.cat(
                [
                    model(input_ids=torch.tensor([list(row)], device=device), use_cache=False).logits[0]
                    for row in rows
                ]
            )
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"train.packing: this base cannot run packed rows: {error}", hint="leave train.packing out"
        ) from error
    finally:
        model.train(was_training)
    compute = str(model.dtype).removeprefix("torch.")
    difference = float((packed.float() - apart.float()).abs().max())
    return difference, float(apart.float().abs().max()), compute if compute in _TOLERANCE else "bfloat16"
