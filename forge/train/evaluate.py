"""What was learned: held-out loss and exact answers, of the base and of the tuned model.

Runs in a worker, on the base as it was trained (NF4 with qlora) with the adapter on and off.
Greedy, whatever sampling the base's generation_config proposes. Answers are generated only where
the expected ones are short; the loss is over the supervised tokens of every held-out row. How sure the
difference of the two losses is comes from how much the rows differ in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forge import report
from forge.adapter.vocabulary import rows_beside
from forge.data.prepare import HELDOUT_FILE
from forge.data.tokens import IGNORED
from forge.train.hardware import choose_hardware
from forge.train.model import BaseSettings, arithmetic_of, load_base

_SHORT_TOKENS = 64
_MOST_ANSWERS = 100
_BATCH = 16

Row = Mapping[str, Any]
RowLoss = tuple[float, int]


def evaluate(base: str, adapter: str, data: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out figures before and after, and the answers behind them.

    `settings`: device, dtype, those of `BaseSettings`, end_of_turn_id, pad_token_id, tokenizer.
    Loss is the mean negative log-likelihood per supervised token, in nats.
    """
    import peft
    from tokenizers import Tokenizer

    with (Path(data) / HELDOUT_FILE).open(encoding="utf-8") as stream:
        rows: list[Row] = [json.loads(line) for line in stream]
    hardware = choose_hardware(settings["device"], settings["dtype"])
    loading = BaseSettings.of(settings)
    model = load_base(base, hardware, loading)
    resized = rows_beside(Path(base), Path(adapter))
    if resized is not None:
        # peft loads the adapter's rows into these, so that the base is measured with them too.
        model.resize_token_embeddings(resized, mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    model.config.use_cache = True
    tokenizer = Tokenizer.from_file(str(Path(settings["tokenizer"]) / "tokenizer.json"))
    # A plain text asks nothing, so nothing answers it.
    asked = [row for row in rows if row["messages"]]
    short = [row for row in asked if len(_expected(row)) <= _SHORT_TOKENS][:_MOST_ANSWERS]
    with model.disable_adapter():
        before = _measure(model, rows, short, tokenizer, settings, "evaluate the base")
    after = _measure(model, rows, short, tokenizer, settings, "evaluate the tuned model")
    return {
        "rows": len(rows),
        "vocabulary": int(model.config.get_text_config().vocab_size),
        "device": hardware.device,
        "compute": hardware.compute,
        "arithmetic": arithmetic_of(hardware, loading),
        "loss": {"before": before["loss"], "after": after["loss"]},
        "loss_error": standard_error(before["rows"], after["rows"]),
        "perplexity": {"before": _perplexity(before["loss"]), "after": _perplexity(after["loss"])},
        "exact": _exact(short, before["answers"], after["answers"], tokenizer),
    }


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
    rows: Sequence[Row],
    short: Sequence[Row],
    tokenizer: Any,
    settings: Mapping[str, Any],
    label: str,
) -> dict[str, Any]:
    losses: list[RowLoss] = []
    answers: list[str] = []
    for batch in _batches(rows):
        losses += _loss(model, batch, settings["pad_token_id"])
        report.advance(label, len(losses), len(rows) + len(short))
    for batch in _batches(short):
        answers += _answers(model, batch, tokenizer, settings)
        report.advance(label, len(rows) + len(answers), len(rows) + len(short))
    total, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
    return {"loss": round(total / max(tokens, 1), 6), "rows": losses, "answers": answers}


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH]


def _loss(model: Any, batch: Sequence[Row], pad: int) -> list[RowLoss]:
    """Of each row the summed loss over its supervised tokens, and how many there are."""
    import torch

    width = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in batch])
    labels = torch.tensor([row["labels"] + [IGNORED] * (width - len(row["labels"])) for row in batch])
    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
    )
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


def _prompt_length(row: Row) -> int:
    """Where the last answer starts: the first position of the last supervised run."""
    labels = row["labels"]
    position = len(labels) - 1
    while position >= 0 and labels[position] == IGNORED:
        position -= 1
    while position >= 0 and labels[position] != IGNORED:
        position -= 1
    return position + 1


def _expected(row: Row) -> Sequence[int]:
    ids: list[int] = row["input_ids"]
    return ids[_prompt_length(row) :]


def _answers(model: Any, batch: Sequence[Row], tokenizer: Any, settings: Mapping[str, Any]) -> list[str]:
    """Greedy answers; prompts are padded on the left, as generation needs (pitfall 29)."""
    import torch
    import transformers

    prompts = [row["input_ids"][: _prompt_length(row)] for row in batch]
    width = max(map(len, prompts))
    pad = settings["pad_token_id"]
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    greedy = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max(len(_expected(row)) for row in batch) + 8,
        eos_token_id=settings["end_of_turn_id"],
        pad_token_id=pad,
    )
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=greedy
        )
    return [str(text) for text in tokenizer.decode_batch(out[:, width:].tolist(), skip_special_tokens=True)]


def _exact(
    short: Sequence[Row], before: Sequence[str], after: Sequence[str], tokenizer: Any
) -> dict[str, Any] | None:
    if not short:
        return None
    expected = tokenizer.decode_batch([list(_expected(row)) for row in short], skip_special_tokens=True)
    answers = [
        {
            "messages": row["messages"][:-1],
            "expected": want.strip(),
            "before": was.strip(),
            "after": now.strip(),
        }
        for row, want, was, now in zip(short, expected, before, after, strict=True)
    ]
    return {
        "rows": len(answers),
        "before": sum(answer["before"] == answer["expected"] for answer in answers),
        "after": sum(answer["after"] == answer["expected"] for answer in answers),
        "answers": answers,
    }
