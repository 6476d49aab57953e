"""Each way to hold and adapt the base: trained for real, loaded by peft itself, measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.read import read_adapter
from forge.adapter.status import ValidateRequest, validate_adapter
from forge.errors import DataError, StageError
from forge.model.config import configuration_of
from forge.model.estimate import activation_bytes
from forge.recipe.training import Lora
from forge.train.evaluate import evaluate
from forge.train.hardware import choose_hardware
from forge.train.live import LivePage
from forge.train.lora import adapted_modules, with_lora
from forge.train.model import BaseSettings, load_base
from forge.train.questions import Question
from forge.train.request import Trained
from forge.train.run import train, with_fewer_rows, within_memory
from forge.verify.loader import Weights
from forge.verify.reference import logits
from forge.verify.sample import Sample
from tests.models import (
    PEFT_WARNS,
    SIZES,
    change_json,
    evaluation,
    load,
    make_adapter,
    make_model,
    prepare_rows,
)
from tests.test_train import arguments

pytestmark = [
    PEFT_WARNS,
    # trl (github.com/huggingface/trl) still sets the old name.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    # peft's word on adapters that are not converted; these are.
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.training,
    pytest.mark.timeout(1500),
]

R4: Mapping[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.0}
WAYS: Mapping[str, dict[str, Any]] = {
    "int8 (A4)": {"method": "int8"},
    "fp4, single quantization (A5)": {
        "method": "qlora", "four_bit_type": "fp4", "double_quantization": False, "quant_storage": "float32"
    },
    "16 bit, eager (H1)": {"dtype": "bf16", "attention": "eager"},
    "full": {"method": "full", "learning_rate": 1e-3},
    "rslora, patterns (C4)": {
        "lora": {
            **R4, "rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.*v_proj": 4}
        }
    },
    "layers, attention (C4)": {"lora": {**R4, "layers": (1,), "targets": "attention"}},
    "regular expression (C2)": {"lora": {**R4, "targets": r".*layers\.0\.mlp\.(up|down)_proj"}},
    "norms saved whole (C3)": {"lora": {**R4, "modules_to_save": ("norm", "layernorm")}},
    "gaussian, dora": {"lora": {**R4, "init": "gaussian", "dora": True}},
    "pissa": {"lora": {**R4, "init": "pissa"}},
    "olora": {"lora": {**R4, "init": "olora"}},
    "optimizer, schedule (G4)": {
        "optimizer": "lion_32bit", "schedule": "cosine_with_min_lr", "schedule_options": {"min_lr_rate": 0.1},
        "neftune_alpha": 5.0, "length_groups": True, "learning_rate": 1e-3,
    },
}  # fmt: skip


def trained(base: Path, data: Path, out: Path, **changes: Any) -> Trained:
    given = {"max_steps": 6, "lora": R4, **changes}
    return within_memory(arguments(base, data, out, **given), train)


@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_training(way: str, base: Path, data: Path, tmp_path: Path) -> None:
    """It learns, peft finds the adapter sound, and the streamed reference is peft's own model."""
    import numpy as np
    import torch

    out = tmp_path / "out"
    facts = trained(base, data, out, **WAYS[way])
    assert facts.steps == 6
    assert validate_adapter(ValidateRequest(base, out)).ok
    measured = evaluate(evaluation(base, out, data))
    assert measured.loss.after < measured.loss.before
    row = (5, 9, 200, 31, 7, 80)
    sample = Sample((row,), ((0, 5),), (True,), 1)
    reference = logits(Weights(base, out), sample, "tuned")
    with torch.inference_mode():
        own = load(base, out, merge=False)(torch.tensor([row])).logits[0, 5].numpy()
    np.testing.assert_allclose(reference[0], own, atol=2e-4, rtol=1e-3)
    if moved := WAYS[way].get("lora", {}).get("init") in ("pissa", "olora"):
        # Converted: it fits the base as it is, at twice the rank.
        assert moved and {layer.rank for layer in read_adapter(out).layers.values()} == {8}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_training_goes_on_from_an_adapter(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    """More epochs: it starts where the adapter ended, keeps its shape, and learns on."""
    first, out = tmp_path / "first", tmp_path / "out"
    trained(base, data, first, method=method, max_steps=12)
    trained(base, data, out, method=method, max_steps=12, continue_from=str(first), lora={"r": 16})
    assert {layer.rank for layer in read_adapter(out).layers.values()} == {4}
    once = evaluate(evaluation(base, first, data, quantize=method == "qlora")).loss
    twice = evaluate(evaluation(base, out, data, quantize=method == "qlora")).loss
    assert twice.after < once.after < twice.before
    log = (out / "logs" / "training.jsonl").read_text().splitlines()
    assert json.loads(log[0])["loss"] < (once.after + once.before) / 2


def test_an_adapter_whose_file_lacks_a_whole_module_is_no_start(
    base: Path, data: Path, tmp_path: Path
) -> None:
    first = make_adapter(base, tmp_path / "first", target_modules=["q_proj"])
    change_json(first / "adapter_config.json", modules_to_save=["up_proj"])
    with pytest.raises(DataError, match=r"train\.continue_from: .*fit") as refused:
        trained(base, data, tmp_path / "out", max_steps=1, continue_from=str(first))
    assert refused.value.hint


def test_an_adapter_of_another_base_is_no_start(base: Path, data: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", "home-made", intermediate_size=1024)
    trained(other, prepare_rows(other, tmp_path), tmp_path / "first", max_steps=1)
    with pytest.raises(DataError, match=r"train\.continue_from: .*fit"):
        trained(base, data, tmp_path / "out", max_steps=1, continue_from=str(tmp_path / "first"))


def test_what_is_adapted_is_reported(base: Path, data: Path, tmp_path: Path) -> None:
    """C5, pitfall 65."""
    out = tmp_path / "out"
    facts = trained(base, data, out, max_steps=1, lora={**R4, "targets": "attention", "layers": (1,)})
    assert facts.modules == {"k_proj": 1, "o_proj": 1, "q_proj": 1, "v_proj": 1}
    assert sorted(read_adapter(out).layers) == [f"model.layers.1.self_attn.{one}_proj" for one in "koqv"]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_the_book_s_table_of_attention_has_its_shape() -> None:
    """Table 5.1, H1: of OPT's attention, what 256 and 1,024 tokens keep for the backward pass.

    The book's layer grew 9.87-fold with eager and 2.58-fold with sdpa, weights counted; here they are not.
    """
    short, long = (
        {kind: _kept_by_attention(kind, tokens) for kind in ("eager", "sdpa")} for tokens in (256, 1024)
    )
    assert long["eager"] / short["eager"] == pytest.approx(9.87, rel=0.1)
    assert long["sdpa"] / short["sdpa"] == pytest.approx(4, rel=0.01)
    assert short["eager"] / short["sdpa"] == pytest.approx(75.63 / 37.99, rel=0.15)
    assert long["eager"] / long["sdpa"] > 4
    # What the estimate counts beyond sdpa's are those scores, once for each copy that a GPU keeps.
    layer = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
    one = configuration_of({"architectures": ["OPTForCausalLM"], **layer})
    scores = [
        activation_bytes(one, batch=2, sequence=tokens, attention="eager", dtype_bytes=4)
        - activation_bytes(one, batch=2, sequence=tokens, dtype_bytes=4)
        for tokens in (256, 1024)
    ]
    assert scores[1] == 16 * scores[0]
    assert scores[1] >= long["eager"] - long["sdpa"]


def _kept_by_attention(kind: str, tokens: int) -> int:
    """Bytes that a layer of attention of OPT-350M's shape saves for the backward pass, two rows."""
    import torch
    import transformers
    from transformers.models.opt.modeling_opt import OPTAttention

    settings = transformers.OPTConfig(hidden_size=1024, num_attention_heads=16, attention_dropout=0.0)
    settings._attn_implementation = kind
    layer = OPTAttention(settings, layer_idx=0)
    own = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    rows = torch.randn(2, tokens, 1024, requires_grad=True)
    ahead = torch.full((tokens, tokens), float("-inf")).triu(1).expand(2, 1, -1, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(rows, attention_mask=ahead if kind == "eager" else None)
    return sum(storage.nbytes() for storage in kept.values())


def test_a_run_has_nothing_of_the_one_before(base: Path, data: Path, tmp_path: Path) -> None:
    """C7, pitfall 36: in one process, with other targets and another rank."""
    for name, rank in (("q_proj", 4), ("k_proj", 8)):
        lora = {**R4, "r": rank, "targets": (name,)}
        assert trained(base, data, tmp_path / name, max_steps=1, lora=lora).modules == {name: 2}
        layers = read_adapter(tmp_path / name).layers
        assert {layer.rank for layer in layers.values()} == {rank}
        assert sorted(layers) == [f"model.layers.{number}.self_attn.{name}" for number in (0, 1)]


def test_what_is_quantized(base: Path) -> None:
    """A6, A7, A8: the decoder's linear layers and no other; all else in the type that is computed in."""
    hardware = choose_hardware("cpu", "bf16")
    model = load_base(base, hardware, BaseSettings("qlora"))
    packed = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(packed) == 2 * 7 and all(name.startswith("model.layers.") for name in packed)
    others = {
        str(weight.dtype)
        for name, weight in model.named_parameters()
        if name.removesuffix(".weight") not in packed
    }
    assert others == {"torch.bfloat16"}
    computing = {str(module.compute_dtype) for name, module in model.named_modules() if name in packed}
    assert computing == {f"torch.{hardware.compute}"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {**R4, "layers": (7,)}}, "train.lora.layers: the base has no layer 7"),
        ({"lora": {**R4, "rank_pattern": {"qkv": 3}}}, "train.lora.rank_pattern: qkv fits no adapted module"),
        ({"attention": "flash_attention_2"}, "train.attention"),
        ({"schedule": "warmup_stable_decay"}, "train.schedule_options: .*num_decay_steps"),
        ({"lora": {**R4, "token_indices": (5, 9)}}, "train.lora.token_indices: the base ties its output"),
        ({"warmup_steps": 6}, "train.warmup_steps: 6, and the run has 6 steps"),
    ],
)
def test_what_cannot_be_trained(
    changes: dict[str, Any], words: str, base: Path, data: Path, tmp_path: Path
) -> None:
    from forge.errors import ForgeError

    with pytest.raises(ForgeError, match=words):
        trained(base, data, tmp_path / "out", **changes)


def test_a_single_step_trains(base: Path, data: Path, tmp_path: Path) -> None:
    """Dry runs with max_steps: 1 (trl, axolotl docs): the step was warm-up with rate 0, then "not sound"."""
    out = tmp_path / "out"
    trained(base, data, out, max_steps=1)
    assert validate_adapter(ValidateRequest(base, out)).ok
    [line] = [json.loads(line) for line in (out / "logs" / "training.jsonl").read_text().splitlines()]
    assert line["learning_rate"] > 0


def test_held_out_rows_while_it_runs(base: Path, data: Path, tmp_path: Path) -> None:
    """I1: every two steps and at the end; the best weights are those that are saved."""
    out = tmp_path / "out"
    # So high a rate that later steps are worse.
    facts = trained(base, data, out, max_steps=7, evaluation_steps=2, learning_rate=5e-2, schedule="constant")
    assert [evaluation.step for evaluation in facts.evaluations] == [2, 4, 6, 7]
    losses = {evaluation.step: evaluation.loss for evaluation in facts.evaluations}
    assert facts.best_step == min(losses, key=lambda step: losses[step])
    measured = evaluate(evaluation(base, out, data))
    assert measured.loss.after == pytest.approx(min(losses.values()), rel=1e-2)


def test_the_report_is_there_while_it_trains(base: Path, data: Path, tmp_path: Path) -> None:
    """I1: it loads itself again until training has ended, with loss, held-out loss and gradient norm."""
    page = tmp_path / "runs" / "mine" / "report.html"
    given = arguments(base, data, tmp_path / "out", max_steps=4, evaluation_steps=2, lora=R4)
    seen: list[str] = []
    write = LivePage._write

    def watched(self: LivePage, *values: Any, **options: Any) -> None:
        write(self, *values, **options)
        seen.append(page.read_text(encoding="utf-8"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LivePage, "_write", watched)
        train(replace(given, page=page))
    assert "step 0 of 4: training begins" in seen[0]
    assert 'http-equiv="refresh"' in seen[0]
    assert "step 4 of 4: training has ended; held-out loss" in seen[-1]
    assert "refresh" not in seen[-1]
    assert seen[-1].count("<polyline") == 4
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_questions_are_answered_before_and_at_each_evaluation(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """I2: on the console, on the live page, and among the facts; asking changes no byte of the adapter."""
    row = json.loads((data / "train.jsonl").read_text().splitlines()[0])
    prompt = row["input_ids"][: row["labels"].count(-100)]
    question = Question("There is bacon.", tuple(prompt), end_of_turn_id=2, pad_token_id=0)
    changes = {"max_steps": 20, "evaluation_steps": 10, "learning_rate": 5e-3, "lora": R4}
    given = arguments(base, data, tmp_path / "asked", **changes)
    page = tmp_path / "report.html"
    facts = train(replace(given, questions=(question,), page=page))
    before, *answers = facts.answers
    assert (before.step, [entry.step for entry in answers]) == (0, [10, 20])
    assert before.texts[0] != answers[-1].texts[0] == row["messages"][-1]["content"]
    assert f"train: step 20: There is bacon. → {answers[-1].texts[0]}" in capsys.readouterr().out
    assert f"<dt>step 20</dt><dd>{answers[-1].texts[0]}</dd>" in page.read_text(encoding="utf-8")
    train(arguments(base, data, tmp_path / "unasked", **changes))
    adapters = [tmp_path / name / "adapter_model.safetensors" for name in ("asked", "unasked")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


# As they say it.
_NO_GPU_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
_NO_MAIN_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("memory", ["GPU", "main"])
def test_out_of_memory_is_tried_again_with_fewer_rows(
    memory: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B6: as many rows a step, so that it is the same training; without being asked for it is an error."""
    import torch
    import trl

    error = torch.OutOfMemoryError(_NO_GPU_MEMORY) if memory == "GPU" else RuntimeError(_NO_MAIN_MEMORY)
    changes: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "lora": R4}
    trained(base, data, tmp_path / "whole", **changes)
    step = trl.SFTTrainer.training_step

    def with_room_for_one(self: Any, model: Any, inputs: Any, *values: Any) -> Any:
        if self.state.global_step == 2 and len(inputs["input_ids"]) > 1:
            raise error
        return step(self, model, inputs, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl.SFTTrainer, "training_step", with_room_for_one)
        with pytest.raises(StageError, match="ran out of memory"):
            trained(base, data, tmp_path / "asks", **changes)
        facts = trained(base, data, tmp_path / "again", retry_smaller=True, **changes)
    assert facts.batch_size == 1
    assert "train.batch_size: 1 and train.gradient_accumulation: 4" in "".join(capsys.readouterr())
    losses = [
        [json.loads(line)["loss"] for line in (out / "logs" / "training.jsonl").read_text().splitlines()]
        for out in (tmp_path / "whole", tmp_path / "again")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_rows_are_cut_into_equal_parts(base: Path, tmp_path: Path) -> None:
    given = arguments(base, base, tmp_path / "out", batch_size=6, gradient_accumulation=2)
    parts, smaller = [], with_fewer_rows(given)
    while smaller:
        parts.append((smaller.batch_size, smaller.settings.gradient_accumulation))
        smaller = with_fewer_rows(smaller)
    assert parts == [(3, 4), (1, 12)]


def test_patience_ends_a_run(base: Path, data: Path, tmp_path: Path) -> None:
    """I1, pitfall 47."""
    facts = trained(
        base, data, tmp_path / "out", max_steps=40, evaluation_steps=1, patience=2, learning_rate=0.3,
        schedule="constant", max_gradient_norm=0,
    )  # fmt: skip
    assert facts.stopped_early
    assert facts.steps == (facts.best_step or 0) + 2 < 40


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_do_not_see_each_other(attention: str, base: Path, data: Path, tmp_path: Path) -> None:
    """trl #3526, #1230: packing always failed; F6: the loss of packed rows is that of the rows apart."""
    losses = []
    for packing in (True, False):
        out = tmp_path / str(packing)
        trained(
            base, data, out, max_steps=1, batch_size=8, packing=packing, attention=attention, warmup_steps=0
        )
        [line] = (out / "logs" / "training.jsonl").read_text().splitlines()
        losses.append(json.loads(line)["loss"])
    assert losses[0] == pytest.approx(
        losses[1],
        rel=1e-5,
    )


def test_a_base_that_lets_packed_rows_see_each_other_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pitfall 42."""
    import transformers

    from forge.train.packing import packed_difference, refuse_leaks

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    rows = [[5, 9, 200, 31], [300, 11, 12]]
    difference, largest, _ = packed_difference(model, rows)
    assert difference < 1e-4 < largest
    own = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **given: own(**{**given, "position_ids": None})
    )  # as a family that computes its positions itself
    with pytest.raises(DataError, match="lets packed rows see each other"):
        refuse_leaks(model, [{"input_ids": row} for row in rows])


TARGETS: Mapping[str, tuple[dict[str, Any], int]] = {
    "auto": ({}, 14),
    "attention": ({"targets": "attention"}, 8),
    "names": ({"targets": ("q_proj", "up_proj")}, 4),
    "a pattern": ({"targets": r".*\.k_proj"}, 2),
    "by number": ({"layers": (1,)}, 7),
}


@pytest.mark.parametrize("case", TARGETS)
def test_only_the_language_model_of_a_multimodal_base_is_adapted(case: str) -> None:
    """ggml-org/llama.cpp PR 27995, unslothai/unsloth 4534: text never moves factors in a vision tower."""
    lora, count = TARGETS[case]
    modules = adapted_modules(with_lora(_multimodal(), _settings(lora), quantized=False, checkpointing=False))
    assert len(modules) == count
    assert all(name.startswith("model.language_model.layers.") for name in modules)


def test_targets_in_the_vision_tower_are_refused() -> None:
    with pytest.raises(DataError, match="fits no linear layer of the language model") as caught:
        with_lora(_multimodal(), _settings({"targets": ("fc1",)}), quantized=False, checkpointing=False)
    assert caught.value.hint.startswith("its layers are down_proj, gate_proj")


def _settings(lora: Mapping[str, Any]) -> Lora:
    return Lora.model_validate({"dropout": 0.0, **lora})


def _multimodal() -> Any:
    import transformers

    text = {**SIZES, "head_dim": 64, "vocab_size": 320, "query_pre_attn_scalar": 64}
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    configuration = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5,
        boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(configuration)
