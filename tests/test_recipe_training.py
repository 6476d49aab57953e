"""Presets of a training run, and what is refused of it before anything runs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args

import pytest

from forge.errors import RecipeError
from forge.recipe.load import Loaded, load
from forge.recipe.presets import PRESETS
from forge.recipe.schema import Train
from forge.recipe.training_checks import SCHEDULE_OPTIONS
from forge.recipe.words import TRACKERS

HEAD = "name: mine\nbase: builtin:tiny\ndata: builtin:yoda\n"


def loaded(directory: Path, train: str, *overrides: str) -> Loaded:
    path = directory / "mine.yaml"
    path.write_text(f"{HEAD}train: {train}\n", encoding="utf-8")
    return load(path, overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_what_is_unset(name: str, tmp_path: Path) -> None:
    """G7."""
    train = loaded(tmp_path, f"{{preset: {name}}}").recipe.train
    assert isinstance(train, Train)
    flat = train.model_dump() | {f"lora.{key}": value for key, value in train.lora.model_dump().items()}
    assert {field: flat[field] for field in PRESETS[name]} == PRESETS[name]


def test_the_recipe_s_own_word_stays(tmp_path: Path) -> None:
    found = loaded(tmp_path, "{preset: book-ch0, epochs: 2, lora: {r: 4}}", "train.batch_size=3")
    train = found.recipe.train
    assert isinstance(train, Train)
    assert (train.epochs, train.lora.r, train.lora.alpha, train.batch_size) == (2, 4, 16, 3)
    assert train.optimizer == "paged_adamw_8bit"
    assert found.sources["train.optimizer"].where.endswith("mine.yaml:4")
    steps = loaded(tmp_path, "{preset: book-ch0, max_steps: 2}")
    assert not any("train.epochs" in warning for warning in steps.warnings)


@pytest.mark.parametrize(
    ("train", "field", "words"),
    [
        ("{preset: book}", "train.preset", "book-ch0"),
        ("{objective: dpo, method: full}", "train.method", "three times"),
        ("{objective: dpo, method: lora, lora: {init: pissa}}", "train.lora.init", "moves the base"),
        ("{lora: {init: pissa}}", "train.lora.init", "parts of whole weights"),
        ("{method: auto, lora: {init: pissa}}", "train.lora.init", "use train.method: lora"),
        ("{lora: {init: olora, dora: true}}", "train.lora.dora", "olora is converted"),
        ("{lora: {experts: true, dropout: 0}}", "train.lora.experts", "qlora leaves joined experts as they"),
        ("{method: lora, lora: {experts: true}}", "train.lora.dropout", "set it to 0"),
        (
            "{method: lora, lora: {experts: true, dropout: 0, dora: true}}",
            "train.lora.dora",
            "joined experts are parameters",
        ),
        (
            "{method: lora, lora: {experts: true, dropout: 0, init: orthogonal}}",
            "train.lora.init",
            "use default beside experts",
        ),
        (
            "{method: lora, lora: {experts: true, dropout: 0, layers: [1]}}",
            "train.lora.layers",
            "the experts of every layer",
        ),
        (
            "{devices: 2, strategy: fsdp, method: lora, lora: {experts: true, dropout: 0}}",
            "train.lora.experts",
            "not cut with their factors",
        ),
        ("{lora: {init: olora, modules_to_save: [lm_head]}}", "train.lora.modules_to_save", "without this"),
        ("{lora: {init: olora, token_indices: [5]}}", "train.lora.token_indices", "without this"),
        (
            "{lora: {init: olora, rslora: true, alpha_pattern: {q_proj: 4}}}",
            "train.lora.rslora",
            "with patterns cannot be converted",
        ),
        ("{lora: {rank_pattern: {'(?i)q_proj': 4}}}", "train.lora.rank_pattern.(?i)q_proj", "global flags"),
        ("{lora: {init: orthogonal, rank_pattern: {q_proj: 5}}}", "train.lora.init", "not 5"),
        ("{method: int8, lora: {dora: true}}", "train.lora.dora", "8-bit weights"),
        (
            "{lora: {token_indices: [5], modules_to_save: [embed_tokens]}}",
            "train.lora.token_indices",
            "as a whole already",
        ),
        (
            "{method: lora, lora: {targets: [q_proj], modules_to_save: [q_proj]}}",
            "train.lora.modules_to_save",
            "in one of the two",
        ),
        ("{patience: 3}", "train.patience", "set train.evaluation_steps"),
        ("{max_steps: 5, warmup_steps: 5}", "train.warmup_steps", "would never train"),
        (
            "{schedule: linear, schedule_options: {num_cycles: 2}}",
            "train.schedule_options",
            "linear has no num_cycles; it takes none",
        ),
        ("{schedule: cosine_with_min_lr}", "train.schedule_options", "needs min_lr or min_lr_rate"),
        ("{schedule: warmup_stable_decay}", "train.schedule_options", "needs num_decay_steps"),
        ("{optimizer: galore_adamw_8bit}", "train.optimizer", "gradients of whole matrices"),
        ("{optimizer: adamw_torch_xla}", "train.optimizer", "is for TPUs"),
        ("{attention: flash_attention_2, dtype: fp32}", "train.attention", "in 16 bits only"),
        ("{objective: kto, lora: {init: olora}}", "train.lora.init", "which kto compares with"),
        ("{objective: kto, method: full}", "train.method", "full and kto would hold the model three times"),
        ("{objective: kto, batch_size: 1}", "train.batch_size", "2 at least"),
        ("{objective: kto, length_groups: true}", "train.length_groups", "in an order of its own"),
        ("{objective: orpo, offload_activations: true}", "train.offload_activations", "no such option"),
        ("{objective: orpo, packing: true}", "train.packing", "orpo compares whole rows"),
        ("{objective: dpo, packing: true}", "train.packing", "compares whole rows"),
        ("{objective: dpo, length_groups: true}", "train.length_groups", "in pairs"),
        ("{lora: {init: loftq}}", "train.lora.init", "fits no other file"),
        ("{lora: {init: eva}}", "train.lora.init", "a pass over the rows"),
        ("{continue_from: ./nowhere}", "train.continue_from", "no such directory"),
        ("{compile: true, liger: true}", "train.liger", "joins the same layers"),
        ("{compile: true, offload_activations: true}", "train.offload_activations", "nothing would be moved"),
        ("{compile: true, method: int8}", "train.compile", "cannot be compiled"),
        ("{compile: true, device: mps}", "train.compile", "not made for mps"),
        ("{devices: 0}", "train.devices", "auto, or a list"),
        ("{devices: [0, 0]}", "train.devices", "different numbers"),
        ("{devices: [0, 1], device: cpu}", "train.devices", "those of GPUs"),
        ("{devices: 2, device: mps}", "train.devices", "one GPU"),
        ("{devices: 2, objective: kto}", "train.objective", "on one device"),
        ("{devices: 2, compile: true}", "train.compile", "for one device"),
        ("{devices: auto, nodes: 2}", "train.devices", "the same on each machine"),
        ("{devices: 2, nodes: 2, retry_smaller: true}", "train.retry_smaller", "would not hear of it"),
        ("{method: lora, strategy: fsdp}", "train.strategy", "name train.devices"),
        ("{method: lora, strategy: fsdp, devices: [2]}", "train.strategy", "name train.devices"),
        ("{devices: 2, strategy: fsdp}", "train.quant_storage", "use bfloat16"),
        ("{devices: 2, strategy: deepspeed}", "train.method", "cannot cut 4-bit"),
        ("{devices: 2, strategy: fsdp, method: int8}", "train.method", "cannot be cut"),
        ("{devices: 2, strategy: fsdp, method: full}", "train.method", "not put together"),
        ("{devices: 2, strategy: fsdp, method: auto}", "train.method", "says nothing of several"),
        (
            "{devices: 2, strategy: fsdp, method: lora, lora: {dora: true}}",
            "train.lora.dora",
            "where it is cut",
        ),
        (
            "{devices: 2, strategy: fsdp, method: lora, lora: {init: pissa}}",
            "train.lora.init",
            "whole weights",
        ),
        ("{devices: 2, strategy: fsdp, method: lora, objective: dpo}", "train.objective", "whole model"),
        ("{devices: 2, strategy: fsdp, method: lora, device: cpu}", "train.device", "use ddp"),
        ("{devices: 2, strategy: fsdp, method: lora, evaluation_steps: 5}", "train.evaluation_steps", "best"),
        ("{devices: 2, backend: unsloth}", "train.devices", "on one device"),
        ("{backend: unsloth, method: full}", "train.method", "lora and qlora only"),
        ("{backend: unsloth, method: int8}", "train.method", "lora and qlora only"),
        ("{backend: unsloth, objective: dpo}", "train.objective", "sft only"),
        ("{backend: unsloth, lora: {dora: true}}", "train.lora.dora", "no fast way"),
        ("{backend: unsloth, lora: {rank_pattern: {q_proj: 4}}}", "train.lora.rank_pattern", "the same"),
        (
            "{backend: unsloth, lora: {modules_to_save: [lm_head]}}",
            "train.lora.modules_to_save",
            "its own way",
        ),
        ("{backend: unsloth, packing: true}", "train.packing", "its own way"),
        ("{continue_from: ., method: full}", "train.continue_from", "train.method: full"),
    ],
)
def test_what_is_not_built_is_refused_with_its_reason(
    train: str, field: str, words: str, tmp_path: Path
) -> None:
    """C4, C8: before anything runs."""
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, train)
    (problem,) = caught.value.problems
    assert problem.field == field
    assert words in problem.message


@pytest.mark.parametrize(
    "train",
    [
        "{objective: orpo, method: full}",
        "{objective: orpo, lora: {init: olora}}",
        "{objective: kto}",
    ],
)
def test_orpo_compares_with_no_base(train: str, tmp_path: Path) -> None:
    """So it may be moved, or trained whole."""
    assert isinstance(loaded(tmp_path, train).recipe.train, Train)


@pytest.mark.parametrize("rest", ["objective: kto", "compile: true", "backend: unsloth"])
def test_a_gpu_by_its_number_is_one_device(rest: str, tmp_path: Path) -> None:
    assert isinstance(loaded(tmp_path, f"{{devices: [2], {rest}}}").recipe.train, Train)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("{continue_from: ., lora: {r: 4}}", "train.lora: is not used: train.continue_from has its own"),
        ("{method: full, lora: {r: 4}}", "train.lora: is not used: train.method is full"),
        ("{method: lora, quant_storage: float32}", "train.quant_storage: is not used: train.method is lora"),
        ("{beta: 0.5}", "train.beta: is not used: train.objective is sft"),
        ("{keep: last}", "train.keep: is not used"),
        ("{warmup_steps: 3, warmup_fraction: 0.1}", "train.warmup_fraction: is not used"),
        ("{schedule: constant, warmup_steps: 3}", "train.warmup_steps: is not used"),
        ("{schedule: constant, warmup_fraction: 0.1}", "train.warmup_fraction: is not used"),
        ("{learning_rate: 0.5}", "train.learning_rate: 0.5 is high"),
    ],
)
def test_what_has_no_effect_is_a_doubt(train: str, words: str, tmp_path: Path) -> None:
    assert any(words in warning for warning in loaded(tmp_path, train).warnings)


@pytest.mark.parametrize(
    ("rest", "field"),
    [
        ("train: {lora: {token_indices: [5]}}\nexport: {mode: adapter}", "train.lora.token_indices"),
        ("train: {method: full}\nexport: {mode: adapter}", "train.method"),
        ("train: {evaluation_steps: 5}\ndata: {source: builtin:yoda, eval: 0}", "train.evaluation_steps"),
    ],
)
def test_what_other_sections_leave_no_room_for(rest: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    head = HEAD if "data:" not in rest else "name: mine\nbase: builtin:tiny\n"
    path.write_text(f"{head}{rest}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.training
def test_schedules_and_trackers_are_those_of_transformers() -> None:
    """What a schedule takes is refused in a plan, which loads no transformers."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    schedules = get_args(Train.model_fields["schedule"].annotation)
    own = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name in schedules:
        known = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters.keys() - own
        assert {*SCHEDULE_OPTIONS.get(name, ())} == known
    assert {*TRACKERS} == INTEGRATION_TO_CALLBACK.keys() - {"kubeflow"}  # which its own controller turns on


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("{prompt: a, expect_call: {name: f}}", "expect_call needs tools"),
        ("{prompt: a, tools: [{}], expect_call: {arguments: {}}}", "smoke.0.expect_call.name"),
    ],
)
def test_smoke_queries_with_calls(query: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{HEAD}smoke: [{query}]\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert words in str(caught.value.problems[0])
