"""Every setting of an adapter is known: done as it says, harmless, or refused by name (invariant 2)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.read import read_adapter
from forge.adapter.settings import SETTINGS, faults
from forge.errors import DataError
from tests.conftest import copy_of_tiny
from tests.model_files import write_safetensors
from tests.models import PEFT_WARNS, make_adapter, make_model
from tests.test_bad_files import failed
from tests.test_cli_faults import RECIPE, ROWS, write_rows
from tests.test_export_merge import assert_equal

PLAIN: Mapping[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}
_OF_EARLY_2023 = {"enable_lora", "merge_weights"}


@pytest.mark.training
def test_every_field_of_peft_is_classified() -> None:
    """A new peft with a field that nobody has judged fails here."""
    import peft

    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == SETTINGS.keys() - _OF_EARLY_2023


def test_every_refusal_says_what_to_do() -> None:
    refused = {name: setting.hint for name, setting in SETTINGS.items() if setting.verdict == "refused"}
    assert len(refused) > 10 and all(refused.values())


@pytest.mark.training
def test_what_peft_writes_of_a_plain_adapter_is_accepted(tmp_path: Path) -> None:
    import peft

    peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert list(faults(json.loads((tmp_path / "adapter_config.json").read_text()))) == []


ACCEPTED: Mapping[str, Mapping[str, Any]] = {
    "peft of early 2023": {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False},
    "unset Conv1D": {"fan_in_fan_out": None},
    "dropout a whole number": {"lora_dropout": 0},
    "a start of its own": {"init_lora_weights": "gaussian"},
    "from activations": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "converted": {"init_lora_weights": True, "corda_config": None, "r": 16, "lora_alpha": 32},
    "a pattern of layers": {"target_modules": r".*layers\.[01]\..*q_proj", "exclude_modules": ".*vision.*"},
    "single layers": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "unsloth": {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers"}},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_settings_that_can_be_used(case: str) -> None:
    assert list(faults({**PLAIN, **ACCEPTED[case]})) == []


REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    # huggingface/peft #2270: as saved, these belong to a base that their start was taken out of.
    "pissa": ({"init_lora_weights": "pissa"}, "PiSSA took the base's principal part out of its weights"),
    "pissa fast": ({"init_lora_weights": "pissa_niter_16"}, "PiSSA took"),
    "olora": ({"init_lora_weights": "olora"}, "OLoRA took its start out"),
    "corda": ({"init_lora_weights": "corda"}, "CorDA took its start out"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "LoRA-GA took its start out"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "LoftQ put quantized"),
    "another start": ({"init_lora_weights": "magic"}, "is no start that forge knows"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "works only behind its invocation tokens"),
    # huggingface/peft #2716, #2237, #2489.
    "a bias of its own": ({"lora_bias": True}, "each layer got a bias"),
    "biases": ({"bias": "all"}, "it trained biases too"),
    "biases of its layers": ({"bias": "lora_only"}, "it trained biases too"),
    "experts": (
        {"target_parameters": ["mlp.experts.gate_up_proj_bias"]},
        "forge knows gate_up_proj, down_proj, weight only",
    ),
    "layers anew": ({"layer_replication": [[0, 2], [1, 3]]}, "stacks layers of the base anew"),
    "megatron": ({"megatron_config": {"tensor_model_parallel_size": 2}}, "are those of Megatron"),
    "qalora": ({"use_qalora": True}, "pools the inputs of a GPTQ base"),
    "blocks": ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "token by token"),
    "kasa": ({"kasa_config": {"beta": 1.0}}, "KaSA changed the base's weights too"),
    "monteclora": ({"monteclora_config": {"num_samples": 8}}, "samples its factors"),
    "fused parts": ({"enable_lora": [True, False, True]}, "parts of a fused layer"),
    "no dropout": ({"lora_dropout": None}, "must be a number from 0 to below 1 (got null)"),
    "dropout a word": ({"lora_dropout": "0.1"}, 'must be a number from 0 to below 1 (got "0.1")'),
    "a switch that is a word": ({"use_rslora": "yes"}, 'must be true or false (got "yes")'),
    "no targets": ({"target_modules": []}, "names no layer"),
    "ranks null": ({"rank_pattern": None}, "must be an object (got null)"),
    "arrow, all by default": ({"arrow_config": {}}, "token by token"),
    "no tokens": ({"trainable_token_indices": []}, "names no token"),
    "targets a number": ({"target_modules": 3}, "must be a list of names, or a regular expression (got 3)"),
    "targets no pattern": ({"target_modules": "("}, "is not a regular expression"),
    "layers by name": ({"layers_to_transform": ["one"]}, "must be a layer's number"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "only CAUSAL_LM adapters"),
    "an encoder-decoder": ({"task_type": "SEQ_2_SEQ_LM"}, "only CAUSAL_LM adapters"),
    "pictures": (
        {"auto_mapping": {"base_model_class": "UNet", "parent_library": "diffusers.models.unets"}},
        "which makes pictures",
    ),
    "unknown": (
        {"lora_magic": 3, "peft_version": "0.99.0"},
        "forge does not know this setting (written by peft 0.99.0)",
    ),
    "unknown and unset": ({"lora_magic": None}, "forge does not know this setting"),
    "pattern twice": (
        {"target_modules": "q_proj", "layers_to_transform": [0]},
        "has no meaning where target_modules is a regular expression",
    ),
    "pattern of no layers": ({"layers_pattern": "h"}, "has no meaning without layers_to_transform"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused_by_name(case: str) -> None:
    changes, message = REFUSED[case]
    [fault] = faults({**PLAIN, **changes})
    assert fault.field in changes and message in fault.message


@pytest.mark.programs
def test_a_plan_and_validate_refuse_them(
    tmp_path: Path, forge_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, all of them at once, before anything runs; a start that was taken out says how to save it."""
    monkeypatch.chdir(tmp_path)
    copy_of_tiny(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(RECIPE + "train: {from: ./adapter}\n", encoding="utf-8")
    factors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": shape
        for part, shape in (("A", (8, 64)), ("B", (64, 8)))
    }
    (tmp_path / "adapter").mkdir()
    write_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", factors)
    settings = {**PLAIN, "init_lora_weights": "pissa", "lora_bias": True, "lora_dropout": None}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for command in (["plan", "recipe.yaml"], ["validate", "--base", "base", "--adapter", "adapter"]):
        error = failed(capsys, *command)
        assert {problem["field"] for problem in error["problems"]} == {
            "init_lora_weights", "lora_bias", "lora_dropout",
        }  # fmt: skip
        assert "path_initial_model_for_weight_conversion" in error["hint"]


CONVERTED = ("pissa", "olora")


@PEFT_WARNS
@pytest.mark.training
@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("start", CONVERTED)
def test_a_converted_adapter_is_a_plain_one(start: str, tmp_path: Path) -> None:
    """What the hint asks for: peft writes a LoRA of twice the rank, whose start is `true`."""
    import peft
    import torch
    import transformers

    base = make_model(tmp_path / "base", "llama", "home-made", tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options: Any = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": start}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = start
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.02
    adapted.save_pretrained(tmp_path / "as-it-is")
    with pytest.raises(DataError, match="1 setting cannot be used"):
        read_adapter(tmp_path / "as-it-is")
    adapted.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert_equal(base, tmp_path / "converted", tmp_path / "merged")


@PEFT_WARNS
@pytest.mark.training
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize(("family", "target"), [("gpt2", "attn.c_proj"), ("llama", "o_proj")])
def test_the_layer_s_kind_is_the_base_s_word(family: str, target: str, tmp_path: Path) -> None:
    """A public adapter of distilgpt2 says fan_in_fan_out: false over Conv1D; peft overrides it, both ways.

    The layers are square, so a transposed update would fit.
    """
    base = make_model(tmp_path / "base", family, "home-made", tie_word_embeddings=False)
    conv1d = family == "gpt2"
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[target], fan_in_fan_out=conv1d)
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace(
        f'"fan_in_fan_out": {str(conv1d).lower()}', f'"fan_in_fan_out": {str(not conv1d).lower()}'
    ))  # fmt: skip
    assert_equal(base, adapter, tmp_path / "merged")
