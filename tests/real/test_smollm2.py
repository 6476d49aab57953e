"""The real model of the tests is one: it answers sensibly, and its tokenizer is llama.cpp's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.model.smollm2 import packaged_gguf
from tests.shipping import Workshop

pytestmark = [pytest.mark.training, pytest.mark.slow]

_TEXTS = (
    "What is the capital of France?",
    "It cost $1,234.56 in 2024; 007 wasn't impressed.\n\n\tTwo  spaces, naïve café, 東京, 👋🏽",
    "def f(x):\n    return x ** 2  # don't\r\n",
)


def test_it_answers_a_question(smollm2: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for question, answer in (("What is the capital of France?", "Paris"), ("What is 2 + 2?", "4")):
        messages = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids: Any = asked["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert answer in tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_its_tokenizer_gives_the_ids_of_llama_cpp(smollm2: Path) -> None:
    import llama_cpp
    import tokenizers

    ours = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    theirs = llama_cpp.Llama(str(packaged_gguf()), vocab_only=True, verbose=False)
    for text in _TEXTS:
        assert ours.encode(text).ids == theirs.tokenize(text.encode(), add_bos=False, special=True), text
        assert ours.decode(ours.encode(text).ids) == text
    theirs.close()


@pytest.mark.programs
@pytest.mark.parametrize("train", [{"batch_size": 2}, {"batch_size": 3, "gradient_checkpointing": True}])
def test_its_training_takes_the_memory_that_was_planned(
    train: dict[str, Any], smollm2: Path, workshop: Workshop
) -> None:
    """B4, B7: within a quarter, on the processor, of rows of some 500 tokens."""
    words = " ".join(f"{number} green bottles on the wall," for number in range(70))
    rows = [{"prompt": f"Part {number}?", "completion": f"{number}: {words}"} for number in range(6)]
    (workshop.directory / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"method": "lora", "max_steps": 1, **train}
    recipe = {"name": "long", "base": str(smollm2), "data": {"source": "long.jsonl", "eval": 0}}
    (workshop.directory / "long.yaml").write_text(json.dumps({**recipe, "train": settings}))  # JSON is YAML
    planned = workshop.forge("plan", "long.yaml").fields["memory"]
    trained = workshop.forge("train", "long.yaml").fields
    assert planned["length"] > 400
    assert planned["train_bytes"] == pytest.approx(trained["peak_memory_bytes"], rel=0.25)
