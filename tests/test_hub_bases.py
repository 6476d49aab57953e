"""Bases with the fields of the hub's own config.json, scaled down, shipped from end to end.

Weights are random, vocabularies are the families' own. What the fields bring is what is tried: `auto_map`,
several names for one size, sliding windows, no chat template, one special token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.model.gguf_header import read_gguf
from forge.recipe.starters import directory_of_starters
from tests.models import PEFT_WARNS, change_json
from tests.shipping import Workshop
from tests.vocabularies import write_tokenizer

pytestmark = [
    pytest.mark.slow, pytest.mark.training, pytest.mark.programs, pytest.mark.network,
    pytest.mark.timeout(900), PEFT_WARNS,
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


def without_chat(base: Path, *, special: dict[str, str]) -> None:
    """The tokenizer as such bases have it on the hub: no chat template, no tokens for one, no PAD."""
    path = base / "tokenizer.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    texts = {*special.values()}
    stated["added_tokens"] = [one for one in stated["added_tokens"] if one["content"] in texts]
    path.write_text(json.dumps(stated), encoding="utf-8")
    cleared = {"added_tokens_decoder": None, "pad_token": None}
    change_json(base / "tokenizer_config.json", **{**cleared, **special})
    (base / "chat_template.jinja").unlink()


_END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_PIECES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Starter recipe -> the hub's configuration, vocabulary, its special tokens, changes.
STARTERS: dict[str, tuple[str, str, dict[str, str], dict[str, Any]]] = {
    "gpt2": ("openai-community--gpt2", "gpt-2", _END, {}),
    "llama-2": ("meta-llama--Llama-2-7b-hf", "llama-spm", _PIECES, {}),
    "mistral": ("mistralai--Mistral-7B-v0.1", "llama-spm", _PIECES, {}),
    "falcon": ("tiiuae--falcon-7b--reduced", "gpt-2", _END, {
        "vocab_size": 50264, "bos_token_id": 50256, "eos_token_id": 50256,
    }),
    "opt": ("facebook--opt-350m", "gpt-2", {**_END, "pad_token": "<|pad|>"}, {
        "ffn_dim": 512, "word_embed_proj_dim": 128, "bos_token_id": 50256, "eos_token_id": 50256,
        "pad_token_id": 50259,
    }),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.campaign) if kind in ("mistral", "falcon") else kind
        for kind in STARTERS
    ],
)
def test_the_starter_of_a_base_that_cannot_chat(workshop: Workshop, kind: str) -> None:
    """N4: each learns from its starter recipe; what llama.cpp does not run ends as a checkpoint."""
    hub, vocabulary, special, changes = STARTERS[kind]
    base = scaled(workshop.directory / "base", hub, vocabulary, **changes)
    without_chat(base, special=special)
    (workshop.directory / "recipe.yaml").write_text(
        (directory_of_starters() / f"{kind}.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    pad = ("-o", "base.tokens.pad=<|pad|>") if kind == "opt" else ()
    settings = ("-o", "base.id=./base", *pad, "-o", "data.limit=24", "-o", "verify.learned=off")
    planned = workshop.forge("plan", "recipe.yaml", *settings)
    assert planned.code == 0, planned.said
    answer = workshop.forge(
        "ship", "recipe.yaml", *settings, "-o", "train.max_steps=2", "-o", "train.batch_size=4"
    )
    assert answer.code == 0, answer.said
    if kind == "opt":
        assert answer.fields["certificate"] is None and answer.fields["gguf"] is None
        generates(Path(answer.fields["merged"]))
        return
    assert answer.fields["certificate"]["ok"]
    if kind == "llama-2":
        rows = read_gguf(Path(answer.fields["gguf"])).tensors["token_embd.weight"].shape[0]
        assert rows == 32002
        adapter = json.loads((Path(answer.fields["adapter"]) / "adapter_config.json").read_text())
        assert adapter["modules_to_save"] == ["embed_tokens", "lm_head"]


def generates(checkpoint: Path) -> None:
    """transformers loads every tensor of it, and its chat template writes what training saw."""
    import torch
    import transformers

    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    ids = torch.tensor([asked["input_ids"]])
    assert "### Instruction:" in tokenizer.decode(ids[0])
    assert torch.isfinite(model(ids).logits).all()


_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
# The hub's configuration -> its own vocabulary, changes beside the sizes.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen--Qwen3-4B": ("qwen3", {}),
    "meta-llama--Llama-3.1-8B-Instruct": ("llama-3.1", {}),
    "meta-llama--Llama-2-7b-chat-hf": ("llama-2", {}),
    "google--gemma-3-1b-it": ("gemma-3", {}),
    "deepseek-ai--DeepSeek-V3": ("deepseek-v3", {
        "quantization_config": None, "n_routed_experts": 16, "n_group": 4, "topk_group": 2,
        "num_experts_per_tok": 2, "moe_intermediate_size": 256, "first_k_dense_replace": 1,
        "num_key_value_heads": 4, "num_nextn_predict_layers": 0,
    }),
    "openai--gpt-oss-20b": ("gpt-oss", {
        **_LAYERS, "quantization_config": None, "num_local_experts": 4, "num_experts_per_tok": 2,
        "intermediate_size": 256,
        # The hub's says that its range is not rounded, which llama.cpp does all the same, and is refused.
        "rope_scaling": {**HUB["openai--gpt-oss-20b"]["rope_scaling"], "truncate": True},
    }),
}  # fmt: skip


@pytest.mark.parametrize(
    "hub",
    [
        pytest.param(hub, marks=pytest.mark.campaign) if vocabulary[:5] in ("llama", "gpt-o") else hub
        for hub, (vocabulary, _) in OWN.items()
    ],
)
def test_the_hub_s_own_configuration_and_tokenizer(workshop: Workshop, hub: str) -> None:
    """The converter takes both, llama.cpp has every shape, and the same ids for some 280 hard texts."""
    vocabulary, changes = OWN[hub]
    scaled(workshop.directory / "base", hub, vocabulary, **changes)
    workshop.recipe(base={"id": "./base"}, train="none", export={"quant": "q8_0"})
    planned = workshop.forge("plan", "recipe.yaml", "--deep")
    assert planned.code == 0, planned.said


def test_the_readme_s_phi_3_ships(workshop: Workshop) -> None:
    """N5: with the hub's own config.json, `auto_map` and all, scaled down."""
    scaled(workshop.directory / "base", "microsoft--Phi-3-mini-4k-instruct", "phi-3")
    workshop.recipe(base={"id": "./base"}, train={"max_steps": 2}, export={"quant": "q8_0"})
    answer = workshop.forge("ship", "recipe.yaml")
    assert answer.code == 0, answer.said
    assert answer.fields["certificate"]["ok"]
    assert "own Python code is not run" in answer.said
