"""Greedy answers of a chat model to conversations, and the built-in model's own test.

Runs in torch; for a few hundred short conversations at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.makers.tasks import exam_rows

_BATCH = 30
_MAX_NEW_TOKENS = 48


def answers(model: Any, tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """The model's greedy answers; each conversation ends with the user's message."""
    import torch

    tokenizer.padding_side = "left"
    said: list[str] = []
    model.eval()
    for start in range(0, len(conversations), _BATCH):
        texts = [
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            for messages in conversations[start : start + _BATCH]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            ids = model.generate(**batch, do_sample=False, max_new_tokens=_MAX_NEW_TOKENS)
        prompt_length = batch["input_ids"].shape[1]
        said += tokenizer.batch_decode(ids[:, prompt_length:], skip_special_tokens=True)
    return said


def take_exam(directory: Path) -> list[tuple[str, str, str]]:
    """Task, expected and given answer of each row of `exam_rows`, with the weights in `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = exam_rows()
    given = answers(model, tokenizer, [row.messages[:-1] for row in rows])
    return [(row.task, row.answer, text) for row, text in zip(rows, given, strict=True)]
