"""What a GGUF answers to the rows' prompts: the file by itself, and as a server should. Runs in a worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from forge.verify import sample
from forge.verify.compare import divergence, top_log_probabilities
from forge.verify.measurement import Expected
from forge.verify.served import ServedModel

GREEDY_TOKENS = 12
_GREEDY_PROMPTS = 8
_LIVE_PROMPTS, _LIVE_TOKENS = 16, 8


@dataclass(frozen=True)
class Answered:
    """The file's greedy answers to the first prompts, and its logits behind each of them."""

    made: Sequence[tuple[Sequence[int], Sequence[int]]]
    precise: Sequence[Any]


def prompts_of(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Rows up to their answer: what the model is asked.

    Few rows are also cut within their answers: over one prompt the mean of a divergence says little.
    """
    of_each = math.ceil(_LIVE_PROMPTS / max(len(rows), 1))
    by_row = [_beginnings(row, of_each) for row in rows[:_LIVE_PROMPTS]]
    prompts = [prompt for turn in zip_longest(*by_row) for prompt in turn if prompt]
    return prompts[:_LIVE_PROMPTS]


def _beginnings(row: Mapping[str, Any], count: int) -> list[list[int]]:
    """The row up to its answer, then with ever more of it: at most `count`, evenly spaced."""
    ids, labels = row["input_ids"], row.get("labels") or []
    start = next((at for at, label in enumerate(labels) if label >= 0), len(ids) // 2)
    start, end = (max(1, min(place, sample.LONGEST)) for place in (start, len(ids)))
    places = {start + (end - start) * number // count for number in range(count)}
    return [list(ids[:place]) for place in sorted(places)]


def answer(model: ServedModel, prompts: Sequence[Sequence[int]]) -> Answered:
    """Each prompt is read once."""
    made, precise = [], []
    for number, prompt in enumerate(prompts):
        precise.append(model.after(prompt))
        if number < _GREEDY_PROMPTS:
            made.append((prompt, model.go_on(prompt, precise[-1], GREEDY_TOKENS)))
    return Answered(made, precise)


def expected_live(
    model: ServedModel, prompts: Sequence[Sequence[int]], precise: Sequence[Any]
) -> tuple[Expected, ...]:
    """What the live server's top log-probabilities are held against, with the settings that it has.

    `shift` is the KL divergence of those settings from float32's `precise` logits of the same file.
    """
    expected = []
    for prompt, values in zip(prompts, precise, strict=True):
        logits = model.after(prompt)
        top = tuple(top_log_probabilities(logits, _LIVE_TOKENS))
        expected.append(Expected(tuple(prompt), top, divergence(logits, values)))
    return tuple(expected)
