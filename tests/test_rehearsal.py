"""What cannot be exported is refused before anything is trained, by headers only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge import worker
from forge.errors import DataError
from forge.export.rehearsal import RehearsalRequest, Rehearsed, rehearse_export
from forge.export.request import Ingredients
from forge.model.checkpoint import open_checkpoint
from forge.model.config import check_numbers, configuration_of, rope_types
from forge.model.loading import load_without_values, refuse_incomplete, refuse_surplus
from forge.model.tokenizer_files import read_tokenizer
from tests.models import PEFT_WARNS, change_json, change_tensors, make_adapter, make_model
from tests.shipping import Workshop
from tests.vocabularies import converters, write_tokenizer

pytestmark = [PEFT_WARNS, pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(600)]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama") / "base", "llama", "home-made")


def copy_with(base: Path, directory: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of `base` with tensors replaced, or left out where a change is None."""
    directory.mkdir()
    for path in base.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    change_tensors(directory / "model.safetensors", changes)
    return directory


def refusal_of(base: Path) -> DataError:
    """What `forge ship` would raise for the tensors of `base`."""
    loading = load_without_values(base, open_checkpoint(base).tensors)
    with pytest.raises(DataError) as failed:
        refuse_incomplete(loading, "base")
        refuse_surplus(loading, "base")
    return failed.value


def rehearsed(base: Path) -> Rehearsed:
    template = (base / "chat_template.jinja").read_text(encoding="utf-8")
    model = Ingredients(base, None, base, template, converters())
    return worker.perform(rehearse_export, RehearsalRequest(model, "m", "f16", None, False))


def rehearsed_here(base: Path) -> Rehearsed:
    """`rehearsed`, in this process."""
    template = (base / "chat_template.jinja").read_text(encoding="utf-8")
    model = Ingredients(base, None, base, template, converters())
    return rehearse_export(RehearsalRequest(model, "m", "f16", None, False))


def test_a_whole_checkpoint_has_nothing_missing_and_nothing_too_much(llama: Path) -> None:
    loading = load_without_values(llama, open_checkpoint(llama).tensors)
    assert (loading.missing, loading.surplus, loading.misshapen) == ((), (), ())


def test_a_missing_tensor_is_named_with_what_to_do(llama: Path, tmp_path: Path) -> None:
    """unslothai/unsloth #3508, #4534: transformers would fill it with random numbers and train on."""
    error = refusal_of(copy_with(llama, tmp_path / "base", {UP: None}))
    assert error.message == f"base: the checkpoint lacks {UP}, which LlamaForCausalLM needs"
    assert "copy or download the checkpoint again" in error.hint
    assert [str(one) for one in error.problems] == [f"{UP}: missing"]


def test_a_value_head_is_named_with_how_to_save_without(llama: Path, tmp_path: Path) -> None:
    """ggml-org/llama.cpp #12483: Can not map tensor 'v_head.summary.bias'."""
    import torch

    head = {"v_head.summary.weight": torch.zeros(1, 256), "v_head.summary.bias": torch.zeros(1)}
    error = refusal_of(copy_with(llama, tmp_path / "base", head))
    assert error.message == "base: the checkpoint holds v_head.*, which LlamaForCausalLM has no place for"
    assert "save_pretrained(OTHER)" in error.hint


def test_a_bias_that_transformers_leaves_out_is_refused(llama: Path, tmp_path: Path) -> None:
    """llama.cpp adds whatever biases a file has, so the GGUF would answer otherwise than what was trained."""
    import torch

    bias = "model.layers.0.self_attn.q_proj.bias"
    base = copy_with(llama, tmp_path / "base", {bias: torch.ones(256)})
    with pytest.raises(DataError, match=f"holds {bias}, which LlamaForCausalLM has no place for"):
        rehearsed_here(base)


def test_other_names_and_other_shapes_are_told_apart(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(llama / "model.safetensors")
    names = dict.fromkeys(stored)
    other = {name.replace("model.layers", "decoder.blocks"): one for name, one in stored.items()}
    renamed = refusal_of(copy_with(llama, tmp_path / "renamed", {**names, **other}))
    assert "its tensors are not named as LlamaForCausalLM names them: decoder.blocks.0." in renamed.message
    wide = copy_with(llama, tmp_path / "wide", {UP: stored[UP][:100].contiguous()})
    assert refusal_of(wide).message == (
        f"base: the checkpoint has another shape of {UP}, which LlamaForCausalLM needs"
    )


def test_experts_and_tied_layers_are_matched_as_transformers_does(tmp_path: Path) -> None:
    """Checkpoints have experts apart, or gate and up fused; neither is missing nor too much."""
    for name in ("mixtral", "gpt2"):
        base = make_model(tmp_path / name, name, "home-made")
        loading = load_without_values(base, open_checkpoint(base).tensors)
        assert (loading.missing, loading.surplus, loading.misshapen) == ((), (), ()), name


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("gpt2", {"intermediate_size": 768}, "blk.0.ffn_down.weight"),
        ("stablelm", {"tie_word_embeddings": True}, "output.weight"),
    ],
)
def test_a_configuration_that_llama_cpp_does_not_take_is_refused_by_its_header(
    tmp_path: Path, architecture: str, changes: dict[str, Any], words: str
) -> None:
    """pitfall 53: GPT-2 with an n_inner of its own, a tied StableLM; before, after hours of training."""
    base = make_model(tmp_path / "base", architecture, "home-made", **changes)
    with pytest.raises(DataError, match="cannot become a GGUF") as failed:
        rehearsed(base)
    assert words in failed.value.message


# What is changed of config.json -> words of the refusal.
CONFIGURATIONS: Mapping[str, tuple[dict[str, Any], str]] = {
    "a type that transformers does not take": ({"num_hidden_layers": "2"}, "expected int, got str"),
    "heads that do not divide": ({"num_attention_heads": 3}, "not a multiple of the number"),
    "no heads": ({"num_attention_heads": 0}, "ZeroDivisionError"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is gelu, the family's is silu"),
    "a rotation that the converter leaves out": (
        {"rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 32, "factor": 4.0,
            "long_factor": [2.0] * 32, "original_max_position_embeddings": 128,
        }},
        "rope_type longrope, and llama.cpp's converter of this family writes nothing of it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_that_cannot_be_is_one_error(case: str, llama: Path, tmp_path: Path) -> None:
    """N5: transformers or llama.cpp would end in a traceback, or calculate another model."""
    changes, words = CONFIGURATIONS[case]
    base = copy_with(llama, tmp_path / "base", {})
    change_json(base / "config.json", **changes)
    with pytest.raises(DataError) as failed:
        rehearsed_here(base)
    assert words in failed.value.message and failed.value.hint


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("architecture", "field", "stated", "words"),
    [
        ("qwen3_moe", "norm_topk_prob", (True, False), "norm_topk_prob is false, and llama.cpp weighs"),
        ("qwen2_moe", "norm_topk_prob", (False, True), "norm_topk_prob is true, and llama.cpp weighs"),
        ("olmoe", "norm_topk_prob", (False, True), "norm_topk_prob is true, and llama.cpp weighs"),
        (
            "gpt_oss",
            "rope_parameters",
            ({**_YARN, "truncate": True}, {**_YARN, "truncate": False}),
            "llama.cpp rounds the ends of its range",
        ),
    ],
)
def test_what_llama_cpp_calculates_otherwise_is_refused(
    tmp_path: Path, architecture: str, field: str, stated: tuple[Any, Any], words: str
) -> None:
    """N5: the converter writes neither; the certificate would fail, hours later."""
    base = make_model(
        tmp_path / "base", architecture, "home-made", tie_word_embeddings=False, **{field: stated[0]}
    )
    assert rehearsed(base).tensors
    change_json(base / "config.json", **{field: stated[1]})
    with pytest.raises(DataError, match="cannot become a GGUF") as failed:
        rehearsed(base)
    assert words in failed.value.message and "is trained and served alike" in failed.value.hint


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"type": "linear", "factor": -2.0}, "factor: must be a number above 0 (got -2.0)"),
        ({"rope_type": "yarn", "factor": 0.0}, "factor: must be a number above 0 (got 0.0)"),
        ({"rope_type": "linear", "factor": float("nan")}, "(got NaN)"),
        (
            {"type": "longrope", "long_factor": [1.0, -2.0]},
            "long_factor: must be a number above 0 (got -2.0)",
        ),
        ({"full_attention": {"rope_type": "linear", "factor": "8"}}, '(got "8")'),
    ],
)
def test_numbers_that_no_model_can_be_calculated_with(scaling: dict[str, Any], words: str) -> None:
    """Reported of a hand-made config.json: llama.cpp and transformers calculate on, with no numbers."""
    raw = {"architectures": ["LlamaForCausalLM"], "rope_scaling": scaling, "rms_norm_eps": 1e-5}
    with pytest.raises(DataError) as failed:
        check_numbers(configuration_of(raw), "config.json")
    assert words in str(failed.value.problems[0])
    whole = {**raw, "rope_scaling": {"rope_type": "linear", "factor": 8}, "text_config": {"rms_norm_eps": 0}}
    with pytest.raises(DataError) as failed:
        check_numbers(configuration_of(whole), "config.json")
    assert [problem.field for problem in failed.value.problems] == ["rms_norm_eps"]


def test_rotations_are_read_as_they_are_nested() -> None:
    flat = {"rope_scaling": {"type": "su", "factor": 2}}
    layers = {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}}
    assert rope_types(flat) == {"longrope"}
    assert rope_types({"text_config": {"rope_parameters": {"rope_type": "llama3", **layers}}}) == {
        "yarn", "default",
    }  # fmt: skip


def test_a_sampling_value_of_another_type_is_named(llama: Path, tmp_path: Path) -> None:
    base = copy_with(llama, tmp_path / "base", {})
    (base / "generation_config.json").write_text('{"temperature": "0.7", "eos_token_id": [-1, 2]}')
    with pytest.raises(DataError, match=r"general\.sampling\.temp cannot be '0.7'"):
        rehearsed_here(base)
    assert read_tokenizer(base).eos_ids[0] == 2


def test_phi_4_as_transformers_5_saves_it(tmp_path: Path) -> None:
    """Its vocabulary is of bytes, which the converter knows by a class's name that is written no more."""
    base = make_model(tmp_path / "base", "phi3", "home-made")
    change_json(base / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    assert rehearsed_here(base).ids_compared > 100


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gpt_neox", {"num_key_value_heads": 4, "tie_word_embeddings": False}), ("cohere2", {})],
)
def test_rotations_as_transformers_5_saves_them(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Their converters read `rotary_pct`, which it writes no longer; and -1 is no PAD."""
    base = make_model(tmp_path / "base", kind, "home-made", **changes)
    change_json(base / "config.json", pad_token_id=-1)
    assert rehearsed_here(base).ids_compared > 200


def test_a_converter_that_hands_on_to_another(tmp_path: Path) -> None:
    """Ministral 3: what its converter writes is in the other's file."""
    rope = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0,
        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    base = make_model(tmp_path / "base", "ministral3", "home-made", rope_parameters=rope, head_dim=64)
    assert rehearsed_here(base).tensors > 15


def test_a_ship_is_refused_before_it_trains_and_a_plan_says_so_too(workshop: Workshop, llama: Path) -> None:
    """The public surface: exit 2, the tensor's name, and no artifact of a training."""
    copy_with(llama, workshop.directory / "base", {UP: None})
    workshop.recipe(base="./base")
    for command in (("plan", "recipe.yaml", "--deep"), ("ship", "recipe.yaml")):
        answer = workshop.forge(*command)
        assert answer.code == 2
        assert UP in answer.fields["error"]["message"]
    assert not list((workshop.home / "artifacts" / "train").glob("*/adapter_model.safetensors"))
    alone = workshop.forge("export", "--base", "base", "--out", "out.gguf")
    assert alone.code == 2
    assert "the checkpoint lacks" in alone.fields["error"]["message"]


def test_values_that_are_not_finite_are_refused_before_a_training(workshop: Workshop, llama: Path) -> None:
    """One NaN deep in the base, one infinity in the adapter; the sound base before it is not remembered."""
    import torch
    from safetensors.torch import load_file

    base, broken = workshop.directory / "base", load_file(llama / "model.safetensors")[UP].clone()
    broken[-1, -1] = torch.nan
    workshop.recipe(base="./base")
    copy_with(llama, base, {})
    assert workshop.forge("plan", "recipe.yaml", "--deep").code == 0
    change_tensors(base / "model.safetensors", {UP: broken})
    for command in (("plan", "recipe.yaml", "--deep"), ("ship", "recipe.yaml")):
        answer = workshop.forge(*command)
        assert answer.code == 2
        assert f"{UP} has values that are not finite" in answer.fields["error"]["message"]
    assert not list((workshop.home / "artifacts" / "train").glob("*/adapter_model.safetensors"))

    adapter = make_adapter(llama, workshop.directory / "adapter")
    name = next(iter(load_file(adapter / "adapter_model.safetensors")))
    factor = load_file(adapter / "adapter_model.safetensors")[name]
    change_tensors(adapter / "adapter_model.safetensors", {name: torch.full_like(factor, torch.inf)})
    recipe = f"name: mini\nbase: {llama}\ntrain: {{from: ./adapter}}\n"
    (workshop.directory / "recipe.yaml").write_text(recipe, encoding="utf-8")
    answer = workshop.forge("plan", "recipe.yaml", "--deep")
    assert answer.code == 2
    assert f"{name} has values that are not finite" in answer.fields["error"]["message"]


def test_the_plan_of_a_sound_base_lays_it_out_and_writes_nothing(workshop: Workshop) -> None:
    workshop.recipe()
    before = sorted((workshop.home / "artifacts").glob("*/*"))
    header = workshop.forge("plan", "recipe.yaml", "--deep").fields["header"]
    assert header["ids_compared"] > 100 and header["gguf_bytes"] > 1e6
    assert sorted((workshop.home / "artifacts").glob("*/*")) == before


def test_layers_that_predict_further_may_be_left_out(tmp_path: Path) -> None:
    """unslothai/unsloth #4534: Qwen3.5 as training saves it; the converter asserts without a word.

    Its text part says nothing of the tied output layer, which must not start at random.
    """
    import torch
    import transformers

    rows = -(-write_tokenizer(tmp_path, "home-made") // 32) * 32
    text = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "vocab_size": rows,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "depth": 1, "num_heads": 2, "out_hidden_size": 256,
        "patch_size": 14,
    }  # fmt: skip
    configuration = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=True
    )
    model = transformers.Qwen3_5ForConditionalGeneration(configuration)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert "mtp_num_hidden_layers" not in described
    assert rehearsed(tmp_path).tensors > 20
    change_json(
        tmp_path / "config.json", text_config={**described["text_config"], "mtp_num_hidden_layers": 1}
    )
    assert rehearsed(tmp_path).tensors > 20
