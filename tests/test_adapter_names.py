"""Names as peft accepts them, and as state dicts of wrapped models have them: one reading everywhere (C8)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.adopt import copy_adapter
from forge.adapter.names import as_peft_writes, factor
from forge.adapter.places import other_base, place
from forge.adapter.read import read_adapter
from forge.adapter.status import ValidateRequest, validate_adapter
from forge.adapter.vocabulary import fit
from forge.errors import DataError
from forge.model.checkpoint import open_checkpoint
from forge.model.safetensors_header import read_header
from forge.verify.loader import Weights
from forge.verify.reference import logits
from forge.verify.sample import Sample
from tests.models import PEFT_WARNS, change_json, make_adapter

PREFIX = "base_model.model."
# Public: MakazhanAlpamys/Soup #335 (torch.compile), huggingface/peft #1579 and #2699, vllm #34186,
# modelscope/ms-swift #414.
WRAPPED: Mapping[str, Callable[[str], str]] = {
    "torch.compile outside": lambda name: f"_orig_mod.{name}",
    "torch.compile inside": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "FSDP": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "checkpointing": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "DataParallel": lambda name: f"module.{name}",
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".yoda.weight"),
    "peft around peft": lambda name: PREFIX + name,
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "no model": lambda name: name.replace(f"{PREFIX}model.", PREFIX),
}


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("plain") / "adapter", target_modules=["q_proj"])


def renamed(adapter: Path, directory: Path, change: Callable[[str], str]) -> Path:
    from safetensors.torch import load_file, save_file

    directory.mkdir()
    (directory / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({change(name): one for name, one in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


@PEFT_WARNS
@pytest.mark.training
@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_names_are_read_through(case: str, base: Path, plain: Path, tmp_path: Path) -> None:
    """By validate, by the merge, by the reference (which reads them by itself), and taken in as peft's."""
    import numpy as np

    adapter = renamed(plain, tmp_path / "adapter", WRAPPED[case])
    assert validate_adapter(ValidateRequest(base, adapter)).ok
    ours = place(fit(read_adapter(adapter), open_checkpoint(base))).layers
    theirs = place(fit(read_adapter(plain), open_checkpoint(base))).layers
    assert {name: one.layer.scale for name, one in ours.items()} == {
        name: one.layer.scale for name, one in theirs.items()
    }
    sample = Sample(((5, 9, 200, 31),), ((0, 1), (0, 3)), (True,) * 2, 1)
    np.testing.assert_array_equal(
        logits(Weights(base, adapter), sample, "a"), logits(Weights(base, plain), sample, "b")
    )
    (tmp_path / "taken").mkdir()
    assert copy_adapter(adapter, tmp_path / "taken") is (case != "no model")
    if case != "no model":
        written = read_header(tmp_path / "taken" / "adapter_model.safetensors")
        assert written.keys() == read_header(plain / "adapter_model.safetensors").keys()
    assert place(fit(read_adapter(tmp_path / "taken"), open_checkpoint(base))).layers.keys() == ours.keys()


@PEFT_WARNS
@pytest.mark.training
def test_names_of_no_known_wrapper_say_so(base: Path, plain: Path, tmp_path: Path) -> None:
    adapter = renamed(plain, tmp_path / "a", lambda name: name.replace(PREFIX, f"{PREFIX}engine.net."))
    with pytest.raises(DataError, match="2 of the adapter's 2 parts") as refused:
        validate_adapter(ValidateRequest(base, adapter))
    assert "names of its tensors are wrapped" in refused.value.hint
    assert f"{PREFIX}engine.net.model.layers.0.self_attn.q_proj.weight is in the file" in refused.value.hint
    assert f"peft writes {PREFIX}model.layers.0.self_attn.q_proj.weight" in refused.value.hint


@pytest.mark.training
def test_several_adapters_in_one_file_are_refused(plain: Path, tmp_path: Path) -> None:
    adapter = renamed(
        plain,
        tmp_path / "a",
        lambda name: name.replace(".weight", f".{'one' if 'lora_A' in name else 'two'}.weight"),
    )
    with pytest.raises(DataError, match=r"several adapters \(one, two\)"):
        read_adapter(adapter)


@pytest.mark.training
def test_learned_lengths_are_where_the_settings_say_dora(base: Path, plain: Path, tmp_path: Path) -> None:
    """Read either way, the update would be another one than was trained."""
    dora = make_adapter(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    change_json(dora / "adapter_config.json", use_dora=False)
    with pytest.raises(DataError, match=r"2 layers have the magnitudes of DoRA, .* but use_dora is not set"):
        read_adapter(dora)
    shutil.copytree(plain, tmp_path / "plain")
    change_json(tmp_path / "plain" / "adapter_config.json", use_dora=True)
    with pytest.raises(DataError, match="use_dora is set, and 2 layers have no magnitude"):
        read_adapter(tmp_path / "plain")


@PEFT_WARNS
@pytest.mark.training
def test_a_configuration_of_other_weights_is_named(base: Path, plain: Path, tmp_path: Path) -> None:
    """peft would put factors of another shape in than the merge does."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    heads = json.loads((other / "config.json").read_text())["num_attention_heads"]
    change_json(other / "config.json", num_attention_heads=2 * heads)
    with pytest.raises(DataError, match=r"config\.json is not that of the weights: 2 layers") as refused:
        validate_adapter(ValidateRequest(other, plain))
    assert "self_attn.q_proj" in refused.value.problems[0].field


@PEFT_WARNS
@pytest.mark.training
def test_what_the_settings_leave_out_is_named(base: Path, tmp_path: Path) -> None:
    """peft drops these factors without a word; an export, which asks no peft, must not merge them."""
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    settings: tuple[dict[str, Any], ...] = (
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": r".*\.v_proj"},
    )
    for changes in settings:
        changed = shutil.copytree(adapter, tmp_path / "b", dirs_exist_ok=True)
        change_json(changed / "adapter_config.json", **changes)
        with pytest.raises(DataError, match="2 of the 4 layers with factors are not adapted") as refused:
            read_adapter(changed)
        assert {problem.field for problem in refused.value.problems} == {
            f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)
        }
    change_json(adapter / "adapter_config.json", layers_to_transform=[1], layers_pattern="layers")
    with pytest.raises(DataError, match="2 of the 4 layers") as refused:
        read_adapter(adapter)
    assert all("layers.0" in problem.field for problem in refused.value.problems)
    change_json(adapter / "adapter_config.json", layers_to_transform=[0, 1])
    read_adapter(adapter)


def test_parts_of_names() -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert factor(f"{PREFIX}{name}.lora_A.weight") == (name, "A", "")
    assert factor(f"{name}.lora_magnitude_vector.default.weight") == (name, "magnitude", "default")
    assert factor(f"{PREFIX}model.embed_tokens.lora_embedding_B.default") == (
        "model.embed_tokens", "embedding B", "default",
    )  # fmt: skip
    assert factor(f"{PREFIX}model.embed_tokens.weight") is None
    wrapped = f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta.default"
    assert as_peft_writes(wrapped) == f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"


BASES: Mapping[str, tuple[str, str, bool]] = {
    "itself": ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct", True),
    "a quantized copy": ("unsloth/llama-3.2-3b-instruct-bnb-4bit", "meta-llama/Llama-3.2-3B-Instruct", True),
    "twice quantized": ("unsloth/Qwen2.5-3B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-3B-Instruct", True),
    "a path": ("/root/model/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B", True),
    "a path of Windows": ("D:\\models\\llama-3-8b-Instruct-bnb-4bit", "./Llama-3-8B-Instruct/", True),
    "a hub's cache": ("/hub/models--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", "gpt2", True),
    "no name": ("", "meta-llama/Meta-Llama-3-8B", True),
    "base against instruct": ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", False),
    "another model": ("/home/alice/models/Llama-3-8B", "../../_bases/chatml", False),
}


@pytest.mark.parametrize("case", BASES)
def test_the_base_that_the_adapter_names(case: str, tmp_path: Path) -> None:
    """K1. Public: huggingface/autotrain-advanced #418 and #487, huggingface/peft #1226."""
    from tests.model_files import write_safetensors

    named, base, same = BASES[case]
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": named}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shapes = {f"{PREFIX}q.lora_A.weight": (8, 4), f"{PREFIX}q.lora_B.weight": (4, 8)}
    write_safetensors(tmp_path / "adapter_model.safetensors", shapes)
    said = other_base(read_adapter(tmp_path), base, {})
    assert (said == "") is same
    assert same or (named in said and base in said)
