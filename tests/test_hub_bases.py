"""Bases with the fields of the hub's own config.json, scaled down, shipped from end to end.

Weights are random, vocabularies are the families' own. What the fields bring is what is tried: `auto_map`,
several names for one size, sliding windows, no chat template, one special token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.shipping import Workshop
from tests.vocabularies import write_tokenizer

pytestmark = [
    pytest.mark.slow, pytest.mark.training, pytest.mark.programs, pytest.mark.network,
    pytest.mark.timeout(900),
]  # fmt: skip
HUB = json.loads((Path(__file__).parent / "cases" / "hub_configurations.json").read_text(encoding="utf-8"))
_SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 4, "n_embd": 256, "n_layer": 2, "n_head": 4,
}  # fmt: skip


def scaled(directory: Path, name: str, vocabulary: str, **changes: Any) -> Path:
    """A base with the fields of the hub's `name`, its sizes cut, without a chat template of its own."""
    import torch
    import transformers

    write_tokenizer(directory, vocabulary)
    fields = {
        **HUB[name],
        **{field: size for field, size in _SMALL.items() if HUB[name].get(field)},
        **changes,
    }
    if HUB[name].get("num_key_value_heads") == HUB[name].get("num_attention_heads"):
        fields["num_key_value_heads"] = 4
    path = directory / "config.json"
    path.write_text(json.dumps({key: value for key, value in fields.items() if key != "auto_map"}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    model.to(torch.bfloat16).save_pretrained(directory)
    path.write_text(json.dumps(fields))
    return directory


def one_special_token(base: Path) -> None:
    """GPT-2's tokenizer as it is on the hub: <|endoftext|> is BOS, EOS and all there is."""
    path = base / "tokenizer.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    stated["added_tokens"] = [one for one in stated["added_tokens"] if one["content"] == "<|endoftext|>"]
    path.write_text(json.dumps(stated), encoding="utf-8")
    end = "<|endoftext|>"
    config = {"bos_token": end, "eos_token": end, "unk_token": end, "tokenizer_class": "GPT2Tokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "chat_template.jinja").unlink()


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi-3": ("microsoft--Phi-3-mini-4k-instruct", "phi-3", {}),
    "gpt2": ("openai-community--gpt2", "gpt-2", {}),
    "falcon": ("tiiuae--falcon-7b--reduced", "gpt-2", {
        "vocab_size": 50264, "bos_token_id": 50256, "eos_token_id": 50256,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_ships(workshop: Workshop, name: str) -> None:
    """N5: Phi-3 is the README's own; the others have no chat template, which the recipe names."""
    hub, vocabulary, changes = CASES[name]
    base = scaled(workshop.directory / "base", hub, vocabulary, **changes)
    if vocabulary == "gpt-2":
        one_special_token(base)
    named = {} if name == "phi-3" else {"chat_template": "alpaca"}
    workshop.recipe(base={"id": "./base", **named}, train={"max_steps": 2}, export={"quant": "q8_0"})
    answer = workshop.forge("ship", "recipe.yaml")
    assert answer.code == 0, answer.said
    assert answer.fields["certificate"]["ok"]
    assert ("own Python code is not run" in answer.said) == (name == "phi-3")
