"""The models that the documents name: the hub's own config.json, scaled down, trained for two steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.read import read_adapter
from forge.model.safetensors_header import read_header
from forge.train.run import train
from tests.models import PEFT_WARNS, make_model, prepare_rows
from tests.test_export_merge import assert_equal
from tests.test_hub_bases import scaled
from tests.test_train import arguments

pytestmark = [
    PEFT_WARNS,
    # trl (github.com/huggingface/trl) still sets the old name.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    # peft (github.com/huggingface/peft) sets by itself what a Conv1D needs, and says so.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.slow,
    pytest.mark.training,
    pytest.mark.timeout(900),
]

# Of the hub's configuration and of our small vocabulary, which has none of the family's ids.
SMALL: Mapping[str, Any] = {
    "vocab_size": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
MODELS: Mapping[str, tuple[str, dict[str, Any], set[str]]] = {
    "OPT": (
        "facebook--opt-350m",
        {"ffn_dim": 512, "word_embed_proj_dim": 128, "n_layer": None},
        {"q_proj", "fc1", "project_in"},
    ),
    "Phi-3": ("microsoft--Phi-3-mini-4k-instruct", {}, {"qkv_proj", "gate_up_proj"}),
    "GPT-2": ("openai-community--gpt2", {}, {"c_attn", "c_fc"}),
    "Llama": ("meta-llama--Llama-3.2-1B-Instruct", {"head_dim": 64}, {"q_proj", "gate_proj"}),
    "Falcon": ("tiiuae--falcon-7b--reduced", {}, {"query_key_value"}),
    "Mistral": ("mistralai--Mistral-7B-v0.1", {}, {"q_proj"}),
    "Qwen2.5": ("Qwen--Qwen2.5-7B-Instruct", {}, {"q_proj"}),
    "Qwen3": ("Qwen--Qwen3-4B", {"head_dim": 64}, {"q_proj"}),
    "OLMo 2": ("allenai--OLMo-2-1124-7B-Instruct", {}, {"q_proj"}),
    "Gemma 3": ("google--gemma-3-1b-it", {"head_dim": 64}, {"q_proj"}),
    "Mixtral": ("mistralai--Mixtral-8x7B-v0.1", {"num_local_experts": 4}, {"q_proj"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_named_model_trains(name: str, tmp_path: Path) -> None:
    """Section 4 of the requirements, C2: the layers of each family are there by their names."""
    hub, changes, modules = MODELS[name]
    base = scaled(tmp_path / "base", hub, "home-made", **{**SMALL, **changes})
    data = tmp_path / "data"
    data.mkdir()
    prepare_rows(base, data)
    out = tmp_path / "out"
    method = "lora" if name in ("GPT-2", "Mixtral") else "qlora"
    # Beside experts `auto` is `attention`, which a ship resolves before it trains.
    lora = {"r": 8, "targets": "attention" if name == "Mixtral" else "auto"}
    facts = train(arguments(base, data, out, method=method, max_steps=2, lora=lora))
    assert facts.steps == 2
    assert modules <= facts.modules.keys()
    adapter = read_adapter(out)
    assert len(adapter.layers) == sum(facts.modules.values())


def test_a_mixture_is_trained_whole_with_its_routers(tmp_path: Path) -> None:
    """G8: trl balances what routers choose, and looks for a number that Granite names otherwise."""
    base = make_model(tmp_path / "base", "granitemoe", "home-made", tie_word_embeddings=False)
    data = tmp_path / "data"
    data.mkdir()
    prepare_rows(base, data)
    out = tmp_path / "out"
    facts = train(arguments(base, data, out, method="full", max_steps=2))
    assert facts.steps == 2
    saved = read_header(out / "adapter_model.safetensors")
    assert sum("router" in name for name in saved) == 2


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_the_experts_are_trained_and_merged(family: str, tmp_path: Path) -> None:
    """C2: transformers has them joined; Granite's configuration lacks what trl reads to balance a router."""
    base = make_model(tmp_path / "base", family, "home-made", tie_word_embeddings=False)
    data = tmp_path / "data"
    data.mkdir()
    prepare_rows(base, data)
    lora = {"r": 4, "dropout": 0, "targets": "attention", "experts": True}
    out = tmp_path / "out"
    facts = train(arguments(base, data, out, method="lora", max_steps=2, lora=lora))
    assert {"q_proj": 2, "gate_up_proj": 2, "down_proj": 2}.items() <= facts.modules.items()
    adapter = read_adapter(out)
    experts = [layer for layer in adapter.layers.values() if layer.experts]
    assert len(experts) == 4
    assert_equal(base, out, tmp_path / "merged")
