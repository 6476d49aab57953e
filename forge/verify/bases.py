"""Which base an adapter of QLoRA is merged into: the one it names, or what NF4 left of it. Runs in a worker.

The adapter was trained beside the NF4 base, but the full one is nearer to what the model knew: which
of the two answers better is a matter of measurement. Both are run in float32 over held-out rows; merged
into the NF4 base the model is the one that was trained.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge.model.config import read_configuration
from forge.model.tokenizer_files import read_tokenizer
from forge.verify import reference, sample
from forge.verify.compare import compare, losses
from forge.verify.inputs import read_rows
from forge.verify.loader import Weights

_STANDARD_ERRORS = 2.0


def choose_base(base: str, adapter: str, rows: str, rows_are: str, trust_remote_code: bool) -> dict[str, Any]:
    """Give `chosen` (original or nf4), `why` in words, and the figures it stands on.

    `rows` is a JSONL file of input_ids and labels, `rows_are` what the words call them ("held-out"). The
    loss is the mean of the answers' tokens, in nats. nf4 is chosen where the original base makes it worse
    by more than two standard errors of the difference, token by token; a tie keeps the original.
    Raises `DataError` as `reference.logits` and `sample.draw` do.
    """
    directory = Path(base)
    facts, given = read_configuration(directory), read_rows(Path(rows))
    vocabulary = facts.vocabulary_size or read_tokenizer(directory).vocabulary_size
    drawn = sample.draw(given, vocabulary, facts.max_positions)
    original = Weights(directory, Path(adapter), trust_remote_code=trust_remote_code)
    trained = reference.logits(replace(original, nf4=True), drawn, "merged into the NF4 base")
    full = reference.logits(original, drawn, "merged into the original base")
    before, after = losses(trained, drawn), losses(full, drawn)
    worse = after - before
    error = float(worse.std(ddof=1) / math.sqrt(len(worse))) if len(worse) > 1 else math.inf
    chosen = "nf4" if worse.mean() > _STANDARD_ERRORS * error else "original"
    loss = {"original": float(after.mean()), "nf4": float(before.mean())}
    return {
        "chosen": chosen,
        "why": _words(rows_are, loss, error, len(worse), chosen),
        "loss": loss,
        "error": error if math.isfinite(error) else None,
        "kl_mean": compare(trained, full, drawn).kl_mean,
        "rows": len(drawn.rows),
        "tokens": len(worse),
    }


def _words(rows_are: str, loss: dict[str, float], error: float, tokens: int, chosen: str) -> str:
    share = f"{loss['original'] - loss['nf4']:+.4f} ± {error:.4f}"
    reason = "worse than chance explains" if chosen == "nf4" else "not worse than chance explains"
    return (
        f"loss on {rows_are} rows {loss['original']:.4f} in the original base, "
        f"{loss['nf4']:.4f} as trained in NF4: {share} over {tokens} tokens, {reason}"
    )
