"""An adapter is read, counted, scaled and judged on its base; what is wrong with it is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.places import place
from forge.adapter.read import TokenRows, find_base_tensor, read_adapter, scale_of
from forge.adapter.status import ValidateRequest, validate_adapter
from forge.adapter.vocabulary import fit
from forge.codec import to_plain
from forge.errors import CheckError, DataError, ForgeError
from forge.model.checkpoint import open_checkpoint
from tests.models import PEFT_WARNS, change_json, change_tensors, make_adapter, make_model

pytestmark = [PEFT_WARNS, pytest.mark.training, pytest.mark.timeout(1500)]

LINEAR = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256}  # outputs, each from 256
MLP = {"gate_proj": (256, 512), "up_proj": (256, 512), "down_proj": (512, 256)}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("untied") / "base"
    return make_model(directory, "llama", "home-made", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("plain") / "adapter", r=8, lora_alpha=16)


def test_a_sound_adapter(base: Path, plain: Path) -> None:
    """C5, K6, K7: parameters are the sum of r x (in + out); it may be exported both ways."""
    told = validate_adapter(ValidateRequest(base, plain))
    each = sum(8 * (256 + out) for out in LINEAR.values()) + sum(8 * (a + b) for a, b in MLP.values())
    modules = {f"self_attn.{name}" for name in LINEAR} | {f"mlp.{name}" for name in MLP}
    assert told.trainable_parameters == 2 * each
    assert told.adapted_modules == tuple(
        sorted(f"model.layers.{n}.{name}" for n in (0, 1) for name in modules)
    )
    assert (told.ok, told.pure, told.impurities, told.problems) == (True, True, (), ())
    assert told.exports == ("merged", "adapter")
    assert told.scale == 2.0
    status = told.status
    assert (status["enabled"], status["active_adapters"], status["merged_adapters"]) == (
        True,
        ["default"],
        [],
    )
    assert status["num_adapter_layers"] == 14
    assert {layer["module_type"] for layer in told.layers} == {"lora.Linear"}
    json.dumps(to_plain(told))


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"r": 64, "lora_alpha": 16, "use_rslora": True}, 2.0),
        ({"r": 4, "lora_alpha": 32}, 8.0),
        ({"r": 8, "lora_alpha": 8, "use_rslora": True}, round(8 / math.sqrt(8), 6)),
    ],
)
def test_the_true_scale(options: dict[str, Any], scale: float, base: Path, tmp_path: Path) -> None:
    """Silent wrong 9: with rsLoRA and r = 64 alpha / r is eight times too small."""
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj"], **options)
    assert validate_adapter(ValidateRequest(base, adapter)).scale == pytest.approx(scale, abs=1e-6)


def test_scales_by_pattern_are_peft_s(base: Path, tmp_path: Path) -> None:
    """C4: alpha_pattern and rank_pattern, by name, by path and by regular expression."""
    import peft
    import torch
    import transformers

    adapter = make_adapter(
        base, tmp_path / "a", r=8, lora_alpha=16, use_rslora=True,
        alpha_pattern={"q_proj": 64, r"model.layers.1.mlp.(up|down)_proj": 4},
        rank_pattern={"^model.layers.0.mlp.up_proj": 2, "k_proj": 32},
    )  # fmt: skip
    ours = {module: layer.scale for module, layer in read_adapter(adapter).layers.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in peft.PeftModel.from_pretrained(model, adapter).named_modules()
        if isinstance(getattr(module, "scaling", None), dict)  # attention has a number of that name
    }
    assert ours == pytest.approx(theirs)
    assert len(set(ours.values())) == 5


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),  # GPT-2, saved by its inner model
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.a.weight", "language_model.model.layers.0.a.weight"),
        ("model.language_model.layers.0.a.weight", None),
    ],
)
def test_a_module_is_found_under_the_checkpoints_name(name: str, stored: str | None) -> None:
    """Another part of a multimodal base is no place for the text model's."""
    base = {"language_model.layers.0.b.weight": 0, "visual.layers.0.a.weight": 0}
    assert find_base_tensor(name, {**base, stored: 0} if stored else base) == stored


IMPURE: Mapping[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "it carries whole tensors: lm_head.weight"),
    "dora": ({"use_dora": True}, "DoRA magnitudes have no place in a GGUF adapter"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "it adapts the embedding"),
    "rows": (
        {"trainable_token_indices": {"embed_tokens": [3]}},
        "it carries rows of tokens: model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("kind", IMPURE)
def test_impure_adapters_are_for_merging(kind: str, untied: Path, tmp_path: Path) -> None:
    """D13, N1, N4; pitfalls 21 and 52: told from the tensors, not from the configuration alone."""
    options, reason = IMPURE[kind]
    adapter = make_adapter(untied, tmp_path / "a", **{"target_modules": ["q_proj"], **options})
    told = validate_adapter(ValidateRequest(untied, adapter))
    assert told.pure is False
    assert reason in told.impurities
    assert told.exports == ("merged",)


def test_rows_of_tokens_have_a_place(base: Path, tmp_path: Path) -> None:
    """Up to the last row of the base, and as wide as that."""
    made = make_adapter(
        base, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}
    )
    adapter, checkpoint = read_adapter(made), open_checkpoint(base)
    [(name, rows)] = adapter.rows.items()
    count, width = checkpoint.tensors[name].shape

    def placed(rows: TokenRows) -> list[str]:
        try:
            place(fit(replace(adapter, rows={name: rows}), checkpoint))
        except DataError as refused:
            return [problem.message for problem in refused.problems]
        return []

    assert placed(replace(rows, tokens=(count - 1,))) == []
    assert placed(replace(rows, tokens=(count,))) == [f"token {count} has no row, there are {count}"]
    other = replace(rows, values=replace(rows.values, shape=(1, width + 1)))
    assert placed(other) == [f"rows of ({width + 1},) do not fit the base's ({count}, {width})"]


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2, r = 8 on c_attn: 8 x (in + out) a layer."""
    base = make_model(tmp_path / "base", "gpt2", "home-made")
    adapter = make_adapter(base, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    told = validate_adapter(ValidateRequest(base, adapter))
    assert told.trainable_parameters == 2 * 8 * (256 + 768)
    assert told.impurities == ("its layers are Conv1D, whose factors are transposed",)


def changed(plain: Path, to: Path, edit: Mapping[str, Any]) -> Path:
    """A copy with tensors replaced; the names are those of the file without their prefix."""
    shutil.copytree(plain, to)
    prefix = "base_model.model.model.layers."
    change_tensors(to / "adapter_model.safetensors", {prefix + name: value for name, value in edit.items()})
    return to


def problems_of(kind: type[ForgeError], base: Path, adapter: Path) -> list[str]:
    with pytest.raises(kind) as caught:
        validate_adapter(ValidateRequest(base, adapter))
    return [str(problem) for problem in caught.value.problems]


def test_numbers_that_are_no_good_are_named(base: Path, plain: Path, tmp_path: Path) -> None:
    """Silent wrong 11: an adapter of zeros is loaded, active, and without effect."""
    import torch

    bad = torch.zeros(8, 256)
    bad[3, 7] = float("nan")
    adapter = changed(
        plain,
        tmp_path / "a",
        {"0.self_attn.q_proj.lora_A.weight": bad, "1.self_attn.v_proj.lora_B.weight": torch.zeros(128, 8)},
    )
    assert sorted(problems_of(CheckError, base, adapter)) == [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: has values that are not finite",
    ]
    zeros = {
        f"{layer}.{name}.lora_B.weight": torch.zeros(*shape)
        for layer in (0, 1)
        for name, shape in (
            *((f"self_attn.{name}", (out, 8)) for name, out in LINEAR.items()),
            *((f"mlp.{name}", (out, 8)) for name, (_, out) in MLP.items()),
        )
    }
    nothing = changed(plain, tmp_path / "b", zeros)
    assert all(": is all zero" in problem for problem in problems_of(CheckError, base, nothing))


def test_one_layer_that_changes_nothing_is_a_warning(base: Path, plain: Path, tmp_path: Path) -> None:
    import torch

    zero = {"1.self_attn.v_proj.lora_B.weight": torch.zeros(128, 8)}
    told = validate_adapter(ValidateRequest(base, changed(plain, tmp_path / "a", zero)))
    assert told.ok
    assert told.warnings == (
        "1 of 14 layers are all zero and change nothing: model.layers.1.self_attn.v_proj",
    )


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_layers_without_weights_are_named(base: Path, plain: Path, tmp_path: Path) -> None:
    name = "1.mlp.up_proj.lora_{}.weight"
    adapter = changed(plain, tmp_path / "a", {name.format("A"): None, name.format("B"): None})
    assert problems_of(CheckError, base, adapter) == [
        "model.layers.1.mlp.up_proj: the configuration adapts it, the file holds no weights for it"
    ]
    half = changed(plain, tmp_path / "b", {name.format("A"): None})
    with pytest.raises(DataError, match=r"only one LoRA factor for model\.layers\.1\.mlp\.up_proj"):
        read_adapter(half)


def test_an_adapter_of_another_base(plain: Path, tmp_path: Path) -> None:
    """Pitfall 6; every part that does not fit, with both shapes."""
    wider = make_model(tmp_path / "wider", "llama", "home-made", intermediate_size=768)
    problems = problems_of(DataError, wider, plain)
    assert len(problems) == 6
    assert problems[0].endswith("(256, 512) does not fit the base's (256, 768)")
    other = make_model(tmp_path / "other", "gpt2", "home-made")
    problems = problems_of(DataError, other, plain)
    assert len(problems) == 8
    assert all(problem.endswith(": the base has no such tensor") for problem in problems)


def test_a_head_that_was_resized_alone_says_the_numbers(untied: Path, tmp_path: Path) -> None:
    """Pitfalls 6, 32 and D13."""
    import torch

    adapter = make_adapter(untied, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    weights = adapter / "adapter_model.safetensors"
    change_tensors(weights, {"base_model.model.lm_head.weight": torch.zeros(500, 256)})
    with pytest.raises(DataError, match=r"layer: rows are 500 of lm_head, \d+ of model\.embed_tokens"):
        validate_adapter(ValidateRequest(untied, adapter))


UNUSABLE: Mapping[str, tuple[dict[str, Any], str]] = {
    "prefix tuning": ({"peft_type": "PREFIX_TUNING"}, "no LoRA adapter: its peft_type is PREFIX_TUNING"),
    "IA3": ({"peft_type": "IA3"}, "its peft_type is IA3"),
    "MLX": ({"peft_type": None, "fine_tune_type": "lora"}, "no peft_type; they are MLX's"),
    "nobody's": ({"peft_type": None}, "no peft_type; they are not peft's"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "its peft_type is PROMPT_TUNING"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_other_kinds_are_recognised(kind: str, plain: Path, tmp_path: Path) -> None:
    """C8, pitfall 37."""
    changes, message = UNUSABLE[kind]
    adapter = shutil.copytree(plain, tmp_path / "a")
    change_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(DataError, match=message) as caught:
        read_adapter(adapter)
    assert caught.value.hint
    kind = changes["peft_type"]
    if kind:  # what peft merges can be shipped merged, and vectors before the prompt cannot
        assert ("merge_and_unload" in caught.value.hint) is (kind == "IA3")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_quantized_factors_are_refused(dtype: str, plain: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    adapter = shutil.copytree(plain, tmp_path / "a")
    factors = load_file(adapter / "adapter_model.safetensors")
    small = {name: factor.to(getattr(torch, dtype)) for name, factor in factors.items()}
    change_tensors(adapter / "adapter_model.safetensors", small)
    with pytest.raises(DataError, match="floating-point numbers of at least 16 bits") as caught:
        read_adapter(adapter)
    assert "before it was quantized" in caught.value.hint


def test_weights_of_another_name_are_named(plain: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(plain, tmp_path / "a")
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "model.safetensors")
    with pytest.raises(DataError, match=r"; model\.safetensors is there") as caught:
        read_adapter(adapter)
    assert "only renamed" in caught.value.hint
    (adapter / "model.safetensors").rename(adapter / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(DataError, match="but shards of it") as caught:
        read_adapter(adapter)
    assert "join them" in caught.value.hint
    weights.symlink_to("../../blobs/1234")
    with pytest.raises(DataError, match=r"a link to \.\./\.\./blobs/1234, which is not there") as caught:
        read_adapter(adapter)
    assert "cp -rL" in caught.value.hint


def test_a_setting_that_peft_itself_does_not_take_is_one_error(base: Path, tmp_path: Path) -> None:
    """A regular expression that fits no layer of this base."""
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["norm"])
    weights = adapter / "adapter_model.safetensors"
    from safetensors.torch import load_file

    change_tensors(weights, {name: None for name in load_file(weights) if ".lora_" in name})
    change_json(adapter / "adapter_config.json", target_modules="nothing")
    with pytest.raises(DataError, match="peft does not load it: ") as caught:
        validate_adapter(ValidateRequest(base, adapter))
    assert "No modules were targeted" in caught.value.message


def test_directories_that_are_no_adapter(base: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not an adapter: it has no adapter_config\.json"):
        read_adapter(base)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(plain / "adapter_config.json", bare / "adapter_config.json")
    with pytest.raises(DataError, match=r"has no adapter_model\.safetensors$"):
        read_adapter(bare)
    (bare / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match=r"only a pickled \.bin"):
        read_adapter(bare)
    shutil.copyfile(plain / "adapter_model.safetensors", bare / "adapter_model.safetensors")
    (bare / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        read_adapter(bare)
    marked = b"\xef\xbb\xbf" + (plain / "adapter_config.json").read_bytes()
    (bare / "adapter_config.json").write_bytes(marked)
    with pytest.raises(DataError, match="is not JSON: Unexpected UTF-8 BOM"):  # peft reads none either
        read_adapter(bare)
    shutil.copyfile(plain / "adapter_config.json", bare / "adapter_config.json")
    cut = (plain / "adapter_model.safetensors").read_bytes()[:-10]
    (bare / "adapter_model.safetensors").write_bytes(cut)
    with pytest.raises(DataError, match=r"adapter_model\.safetensors"):
        read_adapter(bare)


def test_a_training_run_s_directory_names_its_checkpoints(base: Path, plain: Path, tmp_path: Path) -> None:
    for number in (9, 100, 20):
        shutil.copytree(plain, tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(DataError, match=r"with checkpoint-9, checkpoint-20, checkpoint-100$") as caught:
        read_adapter(tmp_path)
    assert caught.value.hint.endswith(f"the last: {tmp_path / 'checkpoint-100'}")
    read_adapter(tmp_path / "checkpoint-100")
    shutil.copytree(base, tmp_path / "checkpoint-200")
    with pytest.raises(DataError, match=r"checkpoint-200$") as caught:
        read_adapter(tmp_path)
    assert caught.value.hint.endswith(f"base: {tmp_path / 'checkpoint-200'}, train: none")


def test_a_whole_model_is_no_adapter_and_says_how_to_ship_it(base: Path) -> None:
    with pytest.raises(DataError, match=r"it is a whole model$") as caught:
        read_adapter(base)
    assert caught.value.hint == f"ship it with base: {base}, train: none"


MLX_OLD = {"peft_type": None, "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}
# What other savers leave beside the settings and in the file -> the words that refuse it, and the way out.
ODD: Mapping[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], str, str]] = {
    "MLX, before it named itself": (MLX_OLD, {}, "they are MLX's", "mlx_lm.fuse"),
    "alpha 0": ({"lora_alpha": 0}, {}, "1 setting cannot be used", "save it again"),
    "an embedding that is not there": (
        {"modules_to_save": ["embed_tokens"]}, {}, "names embed_tokens, and the file has no tensor", "again",
    ),
    "rows of tokens that are not there": (
        {"trainable_token_indices": [5, 6]}, {}, "the file has no rows of them", "again",
    ),
    "a norm of several": (
        {"modules_to_save": ["norm"]}, {"model.norm.weight": (256,)}, "which the file does not hold", "again",
    ),
    "a value head": ({}, {"v_head.summary.weight": (1, 256)}, "1 of the adapter's 15 parts", "without them"),
    "a classifier": (
        {"modules_to_save": ["score"]}, {"score.weight": (2, 256)}, "1 of the adapter's", "a classifier's",
    ),
    "state of a quantized layer": (
        {}, {"model.layers.0.mlp.up_proj.base_layer.weight.absmax": (16,)}, "1 of the", "quantized layer",
    ),
    "factors of a convolution": (
        {}, {"model.layers.0.mlp.up_proj.lora_A.weight": (8, 256, 1, 1)}, "of linear layers only", "merge",
    ),
    "factors by another tool's name": (
        {}, {"model.layers.0.mlp.up_proj.lora_down.weight": (8, 256)}, "peft does not write", "the tool that",
    ),
    "factors by diffusers' name": (
        {}, {"model.layers.0.mlp.up_proj.lora.down.weight": (8, 256)}, "peft does not write", "the tool that",
    ),
    "factors in a prefix of another tool": (
        {"target_modules": "all-linear"}, {"transformer.model.layers.0.mlp.up_proj.lora_A.weight": (8, 256),
        "transformer.model.layers.0.mlp.up_proj.lora_B.weight": (512, 8)}, "1 of the adapter's 15", "wrapped",
    ),
    "a factor twice": (
        {}, {"_orig_mod.model.layers.0.mlp.up_proj.lora_A.weight": (8, 256)}, "there twice", "each once",
    ),
    "a norm twice": (
        {}, {"model.norm.weight": (256,), "_orig_mod.model.norm.weight": (256,)}, "there twice", "each once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_what_other_savers_leave_is_named(case: str, base: Path, plain: Path, tmp_path: Path) -> None:
    """C8, D7: before peft fails on it, with a hint that fits."""
    import torch

    settings, tensors, message, hint = ODD[case]
    adapter = shutil.copytree(plain, tmp_path / "a")
    change_json(adapter / "adapter_config.json", **settings)
    weights = {
        f"base_model.model.{name}": torch.full(shape, 1.0 + number)
        for number, (name, shape) in enumerate(tensors.items())
    }
    change_tensors(adapter / "adapter_model.safetensors", weights)
    with pytest.raises(DataError, match=message) as caught:
        validate_adapter(ValidateRequest(base, adapter))
    assert hint in caught.value.hint


def test_an_adapter_of_a_multimodal_base_on_its_text_model(base: Path, plain: Path, tmp_path: Path) -> None:
    """Validate, merge and certificate agree: the certificate's reference has no place for it either."""
    import safetensors.torch

    for number, inner in enumerate(("language_model.model.", "model.language_model.")):
        adapter = shutil.copytree(plain, tmp_path / str(number))
        weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
        named = {
            name.replace("model.model.", f"model.{inner}", 1): tensor for name, tensor in weights.items()
        }
        safetensors.torch.save_file(named, adapter / "adapter_model.safetensors")
        with pytest.raises(DataError, match="14 of the adapter's 14 parts do not fit") as caught:
            validate_adapter(ValidateRequest(base, adapter))
        assert "the names of its tensors are wrapped" in caught.value.hint


def test_an_adapter_below_the_directory_is_named(plain: Path, tmp_path: Path) -> None:
    """peft's save_pretrained puts adapters with names of their own into directories below."""
    shutil.copytree(plain, tmp_path / "a" / "yoda")
    with pytest.raises(DataError, match="its directories yoda have one") as caught:
        read_adapter(tmp_path / "a")
    assert caught.value.hint == f"name the adapter: {tmp_path / 'a' / 'yoda'}"
    with pytest.raises(DataError, match="no such directory"):
        read_adapter(tmp_path / "absent")


@pytest.mark.parametrize(
    ("module", "rank", "scale"),
    [
        ("model.layers.0.q_proj", 8, 2.0),
        ("model.layers.10.q_proj", 8, 2.0),
        ("q_proj", 8, 2.0),
        ("xq_proj", 4, 1.0),
    ],
)
def test_patterns_match_whole_names(module: str, rank: int, scale: float) -> None:
    configuration = {"r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}}
    assert scale_of(module, rank, configuration) == scale
