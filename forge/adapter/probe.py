"""A model's logits on tokens that are always the same, to compare its states. Runs in a worker."""

from __future__ import annotations

from typing import Any

_ROWS, _TOKENS = 2, 32
POSITIONS = _ROWS * _TOKENS


def logits_of(model: Any) -> Any:
    """Of random tokens, the same ones each time."""
    import torch

    chosen = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (_ROWS, _TOKENS), generator=chosen)
    return model(input_ids=ids, use_cache=False).logits
