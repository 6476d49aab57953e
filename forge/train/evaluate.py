"""What was learned: held-out loss and exact answers, of the base and of the tuned model.

Runs in a worker, on the base as it was trained (NF4 with qlora) with the adapter on and off.
Greedy, whatever sampling the base's generation_config proposes. Answers are generated only where
the expected ones are short; the loss is over the supervised tokens of every held-out row. How sure the
difference of the two losses is comes from how much the rows differ in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import report
from forge.adapter.vocabulary import rows_beside
from forge.data.prepare import HELDOUT_FILE, PreparedRow
from forge.data.tokens import IGNORED
from forge.train.arithmetic import Arithmetic
from forge.train.figures import Change, Exact, HeldoutAnswer
from forge.train.hardware import choose_hardware
from forge.train.model import BaseSettings, arithmetic_of, load_base
from forge.train.questions import greedy

_SHORT_TOKENS = 64
_MOST_ANSWERS = 100
_BATCH = 16

RowLoss = tuple[float, int]


@dataclass(frozen=True)
class EvaluateRequest:
    """The held-out rows in `data`, asked of `base` as `loading` holds it, with and without `adapter`."""

    base: Path
    adapter: Path
    data: Path
    tokenizer: Path
    loading: BaseSettings
    device: str
    dtype: str
    end_of_turn_id: int
    pad_token_id: int
    beta: float | None = None
    """Of preference pairs: what the rewards are scaled by."""


@dataclass(frozen=True)
class Preferred:
    """Of the held-out pairs, by the reward of DPO: beta x (log-likelihood of the tuned model - of the base).

    `accuracy` is the share of pairs whose chosen answer has the larger reward, `margin` by how much it is the
    larger one on average, `error` that mean's standard error (None for one pair), `likelier` the share whose
    chosen answer is the likelier of the two. Of single answers each good one is paired with each bad one;
    these answer other prompts, so which is the likelier says nothing.
    """

    accuracy: float
    margin: float
    error: float | None
    likelier: Change | None


@dataclass(frozen=True)
class Evaluated:
    """Held-out figures before and after, and the answers behind them; of bad answers there is no loss.

    Loss is the mean negative log-likelihood per supervised token, in nats; `loss_error` is the standard error
    of its change, None for one row. `falling` says what still fell when training ended.
    """

    rows: int
    vocabulary: int
    device: str
    compute: str
    arithmetic: Arithmetic
    loss: Change
    loss_error: float | None
    perplexity: Change
    exact: Exact | None
    falling: str | None = None
    preferred: Preferred | None = None


@dataclass(frozen=True)
class _Measured:
    loss: float
    rows: Sequence[RowLoss]
    answers: Sequence[str]
    rejected: Sequence[RowLoss]


def evaluate(request: EvaluateRequest) -> Evaluated:
    """Measure base and tuned model on the held-out rows."""
    import peft
    from tokenizers import Tokenizer

    with (request.data / HELDOUT_FILE).open(encoding="utf-8") as stream:
        heldout: list[PreparedRow] = [json.loads(line) for line in stream]
    # An answer that is bad is to be unlikely: the loss is that of the others.
    rows = [row for row in heldout if row.get("desirable", True)]
    bad = [row for row in heldout if not row.get("desirable", True)]
    bad += [_rejected(row) for row in rows if "rejected_ids" in row]
    is_paired = len(bad) == len(rows) and all("rejected_ids" in row for row in rows)
    hardware = choose_hardware(request.device, request.dtype)
    model = load_base(request.base, hardware, request.loading)
    resized = rows_beside(request.base, request.adapter)
    if resized is not None:
        # peft loads the adapter's rows into these, so that the base is measured with them too.
        model.resize_token_embeddings(resized, mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, str(request.adapter)).eval()
    tokenizer = Tokenizer.from_file(str(request.tokenizer / "tokenizer.json"))
    # A plain text asks nothing, so nothing answers it.
    asked = [row for row in rows if row["messages"]]
    short = [row for row in asked if len(_expected(row)) <= _SHORT_TOKENS][:_MOST_ANSWERS]
    with model.disable_adapter():
        before = _measure(model, rows, bad, short, tokenizer, request, "evaluate the base")
    after = _measure(model, rows, bad, short, tokenizer, request, "evaluate the tuned model")
    return Evaluated(
        rows=len(rows),
        vocabulary=int(model.config.get_text_config().vocab_size),
        device=hardware.device,
        compute=hardware.compute,
        arithmetic=arithmetic_of(hardware, request.loading),
        loss=Change(before.loss, after.loss),
        loss_error=standard_error(before.rows, after.rows),
        perplexity=Change(_perplexity(before.loss), _perplexity(after.loss)),
        exact=_exact(short, before.answers, after.answers, tokenizer),
        preferred=_preferred(before, after, request.beta, is_paired) if request.beta is not None else None,
    )


def _preferred(before: _Measured, after: _Measured, beta: float, is_paired: bool) -> Preferred:
    good = _rewards(before.rows, after.rows, beta)
    bad = _rewards(before.rejected, after.rejected, beta)
    if is_paired:
        margins = [better - worse for better, worse in zip(good, bad, strict=True)]
        square = _square_error(margins)
    else:
        margins = [better - worse for better in good for worse in bad]
        squares = [_square_error(rewards) for rewards in (good, bad)]
        square = None if None in squares else sum(filter(None, squares))
    return Preferred(
        accuracy=round(sum(margin > 0 for margin in margins) / len(margins), 4),
        margin=round(sum(margins) / len(margins), 6),
        error=None if square is None else round(math.sqrt(square), 8),
        likelier=Change(_likelier(before), _likelier(after)) if is_paired else None,
    )


def _rewards(before: Sequence[RowLoss], after: Sequence[RowLoss], beta: float) -> list[float]:
    return [beta * (was - now) for (was, _), (now, _) in zip(before, after, strict=True)]


def _square_error(values: Sequence[float]) -> float | None:
    """The square of the standard error of their mean; None for one."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    return sum((value - mean) ** 2 for value in values) / (count - 1) / count


def _likelier(measured: _Measured) -> float:
    pairs = list(zip(measured.rows, measured.rejected, strict=True))
    return round(sum(chosen < rejected for (chosen, _), (rejected, _) in pairs) / len(pairs), 4)


def standard_error(before: Sequence[RowLoss], after: Sequence[RowLoss]) -> float | None:
    """That of the difference of the two mean losses, from how it differs between rows; None for one row.

    `before` and `after` are (summed loss, tokens) of the same rows. Rows are drawn, tokens in a row hang
    together, so it is the rows that are counted.
    """
    if len(before) < 2:
        return None
    changes = [was[0] - now[0] for was, now in zip(before, after, strict=True)]
    tokens = [count for _, count in before]
    mean = sum(changes) / sum(tokens)
    spread = sum((change - mean * count) ** 2 for change, count in zip(changes, tokens, strict=True))
    return round(math.sqrt(spread * len(tokens) / (len(tokens) - 1)) / sum(tokens), 8)


def _perplexity(loss: float) -> float:
    return round(math.exp(min(loss, 50.0)), 4)


def _measure(
    model: Any,
    rows: Sequence[PreparedRow],
    bad: Sequence[PreparedRow],
    short: Sequence[PreparedRow],
    tokenizer: Any,
    request: EvaluateRequest,
    label: str,
) -> _Measured:
    losses: list[RowLoss] = []
    answers: list[str] = []
    for batch in _batches(rows):
        losses += _loss(model, batch, request.pad_token_id)
        report.advance(label, len(losses), len(rows) + len(short))
    for batch in _batches(short):
        answers += _answers(model, batch, tokenizer, request)
        report.advance(label, len(rows) + len(answers), len(rows) + len(short))
    rejected: list[RowLoss] = []
    for batch in _batches(bad):
        rejected += _loss(model, batch, request.pad_token_id)
    total, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
    return _Measured(round(total / max(tokens, 1), 6), losses, answers, rejected)


def _rejected(row: PreparedRow) -> PreparedRow:
    """The row with the rejected answer in place of the chosen one."""
    return PreparedRow(input_ids=row["rejected_ids"], labels=row["rejected_labels"], messages=())


def _batches(rows: Sequence[PreparedRow]) -> Iterator[Sequence[PreparedRow]]:
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH]


def _loss(model: Any, batch: Sequence[PreparedRow], pad: int) -> list[RowLoss]:
    """Of each row the summed loss over its supervised tokens, and how many there are."""
    import torch

    width = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([_filled(row["input_ids"], pad, width) for row in batch])
    labels = torch.tensor([_filled(row["labels"], IGNORED, width) for row in batch])
    mask = torch.tensor([_filled([1] * len(row["input_ids"]), 0, width) for row in batch])
    with torch.inference_mode():
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            labels[:, 1:].flatten().to(model.device),
            ignore_index=IGNORED,
            reduction="none",
        )
    sums = loss.view(len(batch), -1).double().sum(1).tolist()
    counts = (labels[:, 1:] != IGNORED).sum(1).tolist()
    return list(zip(sums, counts, strict=True))


def _filled(values: Sequence[int], filler: int, width: int) -> list[int]:
    return [*values, *[filler] * (width - len(values))]


def _prompt_length(row: PreparedRow) -> int:
    """Where the last answer starts: the first position of the last supervised run."""
    labels = row["labels"]
    position = len(labels) - 1
    while position >= 0 and labels[position] == IGNORED:
        position -= 1
    while position >= 0 and labels[position] != IGNORED:
        position -= 1
    return position + 1


def _expected(row: PreparedRow) -> Sequence[int]:
    return row["input_ids"][_prompt_length(row) :]


def _answers(model: Any, batch: Sequence[PreparedRow], tokenizer: Any, request: EvaluateRequest) -> list[str]:
    answers = greedy(
        model,
        [row["input_ids"][: _prompt_length(row)] for row in batch],
        longest=max(len(_expected(row)) for row in batch) + 8,
        end_of_turn_id=request.end_of_turn_id,
        pad_token_id=request.pad_token_id,
    )
    return [str(text) for text in tokenizer.decode_batch(answers, skip_special_tokens=True)]


def _exact(
    short: Sequence[PreparedRow], before: Sequence[str], after: Sequence[str], tokenizer: Any
) -> Exact | None:
    if not short:
        return None
    expected = tokenizer.decode_batch([list(_expected(row)) for row in short], skip_special_tokens=True)
    answers = tuple(
        HeldoutAnswer(tuple(row["messages"][:-1]), want.strip(), was.strip(), now.strip())
        for row, want, was, now in zip(short, expected, before, after, strict=True)
    )
    return Exact(
        rows=len(answers),
        before=sum(answer.before == answer.expected for answer in answers),
        after=sum(answer.after == answer.expected for answer in answers),
        answers=answers,
    )
