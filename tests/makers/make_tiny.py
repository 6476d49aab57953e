"""Makes the built-in chat model from nothing: `python -m tests.makers.make_tiny OUT_DIR`.

A Llama of some four million parameters, trained on the tasks of `tasks.py` on two CPU cores in a few
minutes, with the loss on the answers alone. Same seed, machine, torch and thread count: same bytes;
elsewhere sums are rounded in another order and the weights differ, but not what they can do.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from forge import report
from tests.makers.card import write_card
from tests.makers.exam import take_exam
from tests.makers.sentences import capitalized, vocabulary
from tests.makers.tasks import Row, training_rows
from tests.makers.tokenizer import (
    END_OF_TEXT,
    MAX_LENGTH,
    TURN_END,
    TURN_START,
    VOCABULARY,
    write_tokenizer,
)

SEED = 1
STEPS = 2400
BATCH = 32
PEAK_LEARNING_RATE = 1.5e-3
WARM_UP_STEPS = 50
TOKENIZER_ROWS = 20_000
TOKENIZER_REPEATS = 200
PASS_MARK = 54
_IGNORED = -100
# Rows of so many batches are sorted by length before they are cut up: less padding, same order anywhere.
_SORTED_BATCHES = 20

Encoded = tuple[list[int], list[int]]


def make(directory: Path, *, steps: int = STEPS) -> int:
    """Write the whole model directory; return how many of its own 60 tasks it passes."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(_tokenizer_texts(), directory)
    model = _train(directory, steps)
    _write_model(model, directory)
    outcome = take_exam(directory)
    for task, expected, given in outcome:
        if expected != given:
            report.info(f"wrong: {task}: expected {expected!r}, got {given!r}")
    passed = sum(expected == given for _, expected, given in outcome)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_card(
        directory, passed=passed, parameters=parameters, steps=steps, batch=BATCH, rate=PEAK_LEARNING_RATE
    )
    report.info(f"passes {passed} of {len(outcome)} of its own tasks")
    return passed


def _tokenizer_texts() -> Iterator[str]:
    """Rows, and every word so often, plain and capitalized, that nearly all become one token.

    A model this small copies a word that is one token and stumbles over the pieces of one that is not.
    """
    for row in islice(training_rows(SEED), TOKENIZER_ROWS):
        yield from (f"{message['role']}\n{message['content']}" for message in row.messages)
    yield from (f"{capitalized(word)} {word}" for word in vocabulary() for _ in range(TOKENIZER_REPEATS))
    # What is left of the vocabulary goes to words without a space before them.
    yield from vocabulary()


def encode(row: Row, tokenizer: Any) -> Encoded:
    """Token ids of the conversation in ChatML, and labels: the assistant's turns, the rest ignored."""
    ids: list[int] = []
    labels: list[int] = []
    for message in row.messages:
        opening = tokenizer.encode(f"{TURN_START}{message['role']}\n").ids
        said = tokenizer.encode(f"{message['content']}{TURN_END}\n").ids
        learned = message["role"] == "assistant"
        ids += opening + said
        labels += [_IGNORED] * len(opening) + (said if learned else [_IGNORED] * len(said))
    return ids, labels


def _batches(directory: Path, steps: int) -> Iterator[list[Encoded]]:
    from random import Random

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoded = (encode(row, tokenizer) for row in training_rows(SEED))
    random = Random(SEED)
    for _ in range(math.ceil(steps / _SORTED_BATCHES)):
        rows = sorted(islice(encoded, BATCH * _SORTED_BATCHES), key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), BATCH))
        random.shuffle(starts)
        yield from (rows[start : start + BATCH] for start in starts)


def _new_model(directory: Path) -> Any:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(TURN_END),
            pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        )
    )


def learning_rate_at(step: int, steps: int) -> float:
    """A linear warm-up, then half a cosine down to zero."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return PEAK_LEARNING_RATE * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))


def _train(directory: Path, steps: int) -> Any:
    import torch

    model = _new_model(directory)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    model.train()
    started = time.monotonic()
    for step, rows in enumerate(islice(_batches(directory, steps), steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps)
        loss = model(**_padded(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report.advance("pre-training", step + 1, steps, f"loss {loss.item():.4f}")
    report.info(f"trained {steps} steps in {time.monotonic() - started:.0f} s")
    return model


def _padded(rows: list[Encoded]) -> dict[str, Any]:
    """Right-padded tensors; what is padded is after every real token, which cannot see it."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [_IGNORED] * (width - len(labels)) for _, labels in rows]),
    }


def _write_model(model: Any, directory: Path) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(directory)
    generation = {
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id,
    }
    text = json.dumps(generation, indent=2) + "\n"
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
    # safetensors writes for the owner alone; other users and containers read it too.
    (directory / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    sys.exit(0 if make(Path(sys.argv[1])) >= PASS_MARK else 1)
