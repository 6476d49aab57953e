"""Which base an adapter of QLoRA is merged into: the one it names, or what NF4 left of it. Runs in a worker.

The adapter was trained beside the NF4 base, but the full one is nearer to what the model knew: which
of the two answers better is a matter of measurement. Both are run in float32 over held-out rows; merged
into the NF4 base the model is the one that was trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from forge.export.request import MergeBase
from forge.model.config import read_configuration
from forge.model.tokenizer_files import read_tokenizer
from forge.verify import reference, sample
from forge.verify.compare import compare, losses
from forge.verify.inputs import read_token_rows
from forge.verify.loader import Weights

_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class BasesRequest:
    """`rows` is a JSONL file of input_ids and labels, `rows_are` what words call them ("held-out")."""

    base: Path
    adapter: Path
    rows: Path
    rows_are: str
    trust_remote_code: bool


@dataclass(frozen=True)
class BaseLosses:
    """The mean loss of the answers' tokens, in nats, with the adapter merged into each base."""

    original: float
    nf4: float


@dataclass(frozen=True)
class ChosenBase:
    """What was chosen, `why` in words, and the figures; `error` is None where one token cannot have one."""

    chosen: MergeBase
    why: str
    loss: BaseLosses
    error: float | None
    kl_mean: float
    rows: int
    tokens: int


def choose_base(request: BasesRequest) -> ChosenBase:
    """Choose nf4 where the original base gives a worse loss.

    Worse is by more than two standard errors of the difference, token by token; a tie keeps the original.
    Raises `DataError` as `reference.logits` and `sample.draw` do.
    """
    facts, rows = read_configuration(request.base), read_token_rows(request.rows)
    vocabulary = facts.vocabulary_size or read_tokenizer(request.base).vocabulary_size
    drawn = sample.draw(rows, vocabulary, facts.max_positions)
    original = Weights(request.base, request.adapter, trust_remote_code=request.trust_remote_code)
    trained = reference.logits(replace(original, nf4=True), drawn, "merged into the NF4 base")
    full = reference.logits(original, drawn, "merged into the original base")
    before, after = losses(trained, drawn), losses(full, drawn)
    worse = after - before
    error = float(worse.std(ddof=1) / math.sqrt(len(worse))) if len(worse) > 1 else math.inf
    chosen: MergeBase = "nf4" if worse.mean() > _STANDARD_ERRORS * error else "original"
    loss = BaseLosses(float(after.mean()), float(before.mean()))
    return ChosenBase(
        chosen,
        _words(request.rows_are, loss, error, len(worse), chosen),
        loss,
        error if math.isfinite(error) else None,
        compare(trained, full, drawn).kl_mean,
        len(drawn.rows),
        len(worse),
    )


def _words(rows_are: str, loss: BaseLosses, error: float, tokens: int, chosen: MergeBase) -> str:
    share = f"{loss.original - loss.nf4:+.4f} ± {error:.4f}"
    reason = "worse than chance explains" if chosen == "nf4" else "not worse than chance explains"
    return (
        f"loss on {rows_are} rows {loss.original:.4f} in the original base, "
        f"{loss.nf4:.4f} as trained in NF4: {share} over {tokens} tokens, {reason}"
    )
