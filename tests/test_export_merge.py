"""The streamed merge against peft's own merge_and_unload, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.read import read_adapter
from forge.adapter.vocabulary import fit
from forge.errors import DataError
from forge.export.merge import base_tensors, merged_tensors
from forge.export.nf4 import quantized_in_training
from forge.export.tensors import LazyTensor, stored, write_safetensors
from forge.model.checkpoint import open_checkpoint
from tests.models import change_json, change_tensors, load, make_adapter, make_model

pytestmark = [pytest.mark.training, pytest.mark.timeout(1500)]

CASES: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 64, "lora_alpha": 16, "use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 64, r"layers\.1\.mlp\.down_proj": 4}},
    "rank_pattern": {"rank_pattern": {"^model.layers.0.mlp.up_proj": 2, "k_proj": 16}},
    "modules_to_save": {"modules_to_save": ["input_layernorm", "lm_head", "embed_tokens"]},
    "modules_to_save of modules": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "dora": {"use_dora": True, "use_rslora": True},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "untied": make_model(root / "untied", "llama", "home-made", shards=3, tie_word_embeddings=False),
        "tied": make_model(root / "tied", "llama", "home-made"),
        "gpt2": make_model(root / "gpt2", "gpt2", "home-made"),
    }


def merge(base: Path, adapter: Path, out: Path) -> Path:
    """The merged checkpoint as forge writes it, beside the base's other files."""
    out.mkdir()
    for path in (base / "config.json", base / "generation_config.json"):
        shutil.copyfile(path, out / path.name)
    tensors = merged_tensors(fit(read_adapter(adapter), open_checkpoint(base)))
    write_safetensors(out / "model.safetensors", tensors, lambda done, total: None)
    return out


def assert_equal(base: Path, adapter: Path, out: Path) -> None:
    import torch

    ours, theirs = load(merge(base, adapter, out)).state_dict(), load(base, adapter).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    plain = load(base).state_dict()
    assert any(not torch.equal(plain[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("case", CASES)
def test_merge_equals_peft(case: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    """J2, K2, L; pitfalls 2, 22, 52; silent wrongs 8 and 9. The base has several shards."""
    adapter = make_adapter(bases["untied"], tmp_path / "adapter", **CASES[case])
    assert_equal(bases["untied"], adapter, tmp_path / "merged")


def test_conv1d_merges_transposed(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """Pitfall 65 too: `c_proj` is in the attention and in the MLP."""
    adapter = make_adapter(bases["gpt2"], tmp_path / "adapter", fan_in_fan_out=True)
    assert_equal(bases["gpt2"], adapter, tmp_path / "merged")
    assert {layer.module.rpartition(".")[2] for layer in read_adapter(adapter).layers.values()} == {
        "c_attn", "c_proj", "c_fc",
    }  # fmt: skip


def test_what_the_adapter_does_not_touch_is_copied(bases: Mapping[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases["tied"], tmp_path / "adapter", target_modules=["q_proj"])
    checkpoint = open_checkpoint(bases["tied"])
    merged = open_checkpoint(merge(bases["tied"], adapter, tmp_path / "merged"))
    types = {name: spec.dtype for name, spec in merged.tensors.items()}
    assert types == {name: "F32" if "q_proj" in name else "BF16" for name in checkpoint.tensors}
    with (tmp_path / "merged" / "model.safetensors").open("rb") as written:
        for name, spec in merged.tensors.items():
            if "q_proj" not in name:
                before = checkpoint.tensors[name]
                with before.file.open("rb") as file:
                    file.seek(before.start)
                    written.seek(spec.start)
                    assert file.read(before.bytes) == written.read(spec.bytes)


def problems_of(base: Path, adapter: Path) -> set[str]:
    with pytest.raises(DataError, match="parts do not fit this base") as caught:
        merged_tensors(fit(read_adapter(adapter), open_checkpoint(base)))
    return {str(problem) for problem in caught.value.problems}


def test_dora_of_conv1d_is_refused_by_name(bases: Mapping[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(
        bases["gpt2"], tmp_path / "a", use_dora=True, fan_in_fan_out=True, target_modules=["c_attn"]
    )
    assert problems_of(bases["gpt2"], adapter) == {
        f"transformer.h.{layer}.attn.c_attn: DoRA is merged on linear layers only" for layer in (0, 1)
    }


def test_an_embedding_of_another_width_is_refused(bases: Mapping[str, Path], tmp_path: Path) -> None:
    import torch

    adapter = make_adapter(bases["untied"], tmp_path / "a", modules_to_save=["embed_tokens"])
    name = next(name for name in read_adapter(adapter).replaced if "embed" in name)
    weights = adapter / "adapter_model.safetensors"
    change_tensors(weights, {f"base_model.model.{name}": torch.zeros(500, 128)})
    (problem,) = problems_of(bases["untied"], adapter)
    assert problem.startswith(f"{name}: (500, 128) does not fit the base's (")


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    import torch

    base = make_model(tmp_path / "base", "llama", "home-made")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    bad = torch.full((256,), float("nan"), dtype=torch.bfloat16)
    change_tensors(base / "model.safetensors", {"model.norm.weight": bad})
    with pytest.raises(
        DataError, match=r"model\.safetensors: model\.norm\.weight has values that are not finite"
    ):
        merge(base, adapter, tmp_path / "merged")


def test_an_adapter_of_another_base_is_refused_with_every_part(
    bases: Mapping[str, Path], tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", "llama", "home-made", hidden_size=320, num_attention_heads=5,
                       num_key_value_heads=5)  # fmt: skip
    adapter = make_adapter(other, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    assert problems_of(bases["tied"], adapter) == {
        *(
            f"model.layers.{n}.self_attn.q_proj: (320, 320) does not fit the base's (256, 256)"
            for n in (0, 1)
        ),
        *(f"model.layers.{n}.mlp.down_proj: (320, 512) does not fit the base's (256, 512)" for n in (0, 1)),
    }


def test_the_rank_in_the_file_must_be_the_configured_one(bases: Mapping[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases["tied"], tmp_path / "adapter", target_modules=["q_proj"])
    change_json(adapter / "adapter_config.json", r=4)
    with pytest.raises(DataError, match="the configuration says rank 4, the file holds rank 8"):
        read_adapter(adapter)


def test_nf4_is_the_base_that_training_saw(bases: Mapping[str, Path]) -> None:
    """Silent wrong 10, by choice: the layers and values of a 4-bit load, in float32."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from forge.train.hardware import choose_hardware
    from forge.train.model import BaseSettings, load_base

    base = bases["untied"]
    checkpoint = open_checkpoint(base)
    names = quantized_in_training(base, checkpoint)
    ours = {tensor.name: tensor for tensor in base_tensors(checkpoint, nf4=names)}
    hardware = choose_hardware("cpu", "bf16")
    trained = load_base(base, hardware, BaseSettings("qlora"))
    layers = {
        f"{name}.weight": module for name, module in trained.named_modules() if isinstance(module, Linear4bit)
    }
    assert names == layers.keys()
    for name, layer in layers.items():
        layer.weight.quant_state.dtype = torch.float32
        torch.testing.assert_close(
            ours[name].load(), dequantize_4bit(layer.weight.data, layer.weight.quant_state), rtol=0, atol=0
        )
        assert not torch.equal(ours[name].load(), LazyTensor.load(stored(checkpoint.tensors[name])).float())
    assert ours["lm_head.weight"].dtype == "BF16"


def test_nf4_of_conv1d_is_refused(bases: Mapping[str, Path]) -> None:
    with pytest.raises(DataError, match="does not cover Conv1D"):
        quantized_in_training(bases["gpt2"], open_checkpoint(bases["gpt2"]))
