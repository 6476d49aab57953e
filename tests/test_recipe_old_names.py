"""Names of other tools: understood and reported, or explained."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest

from forge.errors import RecipeError
from forge.recipe.fields import all_names, names_in, values
from forge.recipe.load import load
from forge.recipe.old_names import DROP, OLD_NAMES, TABLE
from tests.test_documents import fields_in

GOOD = "name: small\nbase: builtin:tiny\ndata: {source: builtin:yoda}\n"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str, *overrides: str) -> tuple[dict[str, object], tuple[str, ...]]:
    Path("recipe.yaml").write_text(text)
    found = load(Path("recipe.yaml"), overrides)
    return values(found.recipe), found.warnings


def refused(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as failure:
        read(text, *overrides)
    return [str(problem) for problem in failure.value.problems]


def test_the_arguments_of_transformers_trl_and_peft() -> None:
    """Section 6 of the requirements."""
    text = GOOD + (
        "train:\n  num_train_epochs: 10\n  per_device_train_batch_size: 16\n  max_seq_length: 64\n"
        "  warmup_ratio: 0.1\n  optim: adafactor\n  torch_dtype: bfloat16\n"
        "  lora:\n    lora_alpha: 64\n    target_modules: [q_proj]\n    use_rslora: true\n"
    )
    found, warnings = read(text)
    expected = {
        "train.epochs": 10.0,
        "train.batch_size": 16,
        "train.max_length": 64,
        "train.warmup_fraction": 0.1,
        "train.optimizer": "adafactor",
        "train.dtype": "bf16",
        "train.lora.alpha": 64,
        "train.lora.targets": ["q_proj"],
        "train.lora.rslora": True,
    }
    assert {name: found[name] for name in expected} == expected
    assert warnings == (
        "recipe.yaml:5: train.num_train_epochs is now train.epochs",
        "recipe.yaml:6: train.per_device_train_batch_size is now train.batch_size",
        "recipe.yaml:7: train.max_seq_length is now train.max_length",
        "recipe.yaml:8: train.warmup_ratio is now train.warmup_fraction",
        "recipe.yaml:9: train.optim is now train.optimizer",
        "recipe.yaml:10: train.torch_dtype is now train.dtype",
        "recipe.yaml:12: train.lora.lora_alpha is now train.lora.alpha",
        "recipe.yaml:13: train.lora.target_modules is now train.lora.targets",
        "recipe.yaml:14: train.lora.use_rslora is now train.lora.rslora",
    )


def test_a_flat_file_as_axolotl_has_it() -> None:
    text = (
        "name: flat\nbase_model: org/model\ndataset: builtin:yoda\nval_set_size: 0.05\nadapter: qlora\n"
        "load_in_4bit: true\nlora_r: 8\nlora_target_linear: true\nmicro_batch_size: 2\nnum_epochs: 4\n"
        "sequence_len: 128\nbf16: true\nfp16: false\nlr_scheduler: linear\n"
    )
    found, warnings = read(text)
    expected = {
        "base.id": "org/model",
        "data.source": "builtin:yoda",
        "data.eval": 0.05,
        "train.method": "qlora",
        "train.lora.r": 8,
        "train.lora.targets": "all-linear",
        "train.batch_size": 2,
        "train.epochs": 4.0,
        "train.max_length": 128,
        "train.dtype": "bf16",
        "train.schedule": "linear",
    }
    assert {name: found[name] for name in expected} == expected
    assert len(warnings) == 13
    assert "recipe.yaml:13: fp16 says what is the case anyway; leave it out" in warnings


def test_an_old_section_with_old_names_in_it() -> None:
    found, warnings = read(GOOD + "training_args:\n  num_train_epochs: 2\n  lora_config: {rank: 4}\n")
    assert (found["train.epochs"], found["train.lora.r"]) == (2.0, 4)
    assert warnings == (
        "recipe.yaml:4: training_args is now train",
        "recipe.yaml:5: train.num_train_epochs is now train.epochs",
        "recipe.yaml:6: train.lora_config is now train.lora",
        "recipe.yaml:6: train.lora.rank is now train.lora.r",
    )


def test_both_names_are_a_fault_unless_they_agree() -> None:
    assert refused(GOOD + "train:\n  epochs: 3\n  num_train_epochs: 2\n") == [
        "recipe.yaml:6: train.num_train_epochs: is now train.epochs, "
        "but train.epochs is given too (recipe.yaml:5); keep one"
    ]
    assert refused(GOOD + "train: none\nlora_r: 3\n") == [
        'recipe.yaml:5: lora_r: is now train.lora.r, but train is "none" (recipe.yaml:4) and holds no fields'
    ]
    assert read(GOOD + "train:\n  epochs: 3\n  num_train_epochs: 3\n")[0]["train.epochs"] == 3.0


def test_a_value_without_counterpart_and_a_value_out_of_bounds() -> None:
    assert refused(GOOD + "train:\n  load_in_8bit: 3\n  train_on_inputs: true\n  lora_r: 0\n") == [
        "recipe.yaml:5: train.load_in_8bit: is now train.method; "
        "of its values only true or false has a counterpart",
        "recipe.yaml:6: train.train_on_inputs: is now train.supervise; "
        "of its values only false has a counterpart",
        "recipe.yaml:7: train.lora.r: must be at least 1 (got 0)",
    ]


def test_an_override_by_an_old_name_wins() -> None:
    found, warnings = read(GOOD + "train: {epochs: 3}\n", "train.num_train_epochs=1", "lora_r=4")
    assert (found["train.epochs"], found["train.lora.r"]) == (1.0, 4)
    assert warnings == (
        "-o train.num_train_epochs: train.num_train_epochs is now train.epochs",
        "-o lora_r: lora_r is now train.lora.r",
    )
    assert refused(GOOD, "train.save_steps=5") == [
        "-o train.save_steps: is not a field: checkpoints are written by time (train.checkpoint_minutes) and "
        "resumed from without being asked"
    ]


@pytest.mark.parametrize(
    "said",
    [
        "lora: {bias: none, task_type: CAUSAL_LM, peft_type: LORA}",
        "logging_steps: 10",
        "logging_strategy: epoch",
        "load_in_8bit: false",
        "packing_strategy: bfd",
        "{deepspeed: null, torch_dtype: null, quantization_config: ~}",
        "{label_smoothing_factor: 0.0, train_sampling_strategy: random}",
    ],
)
def test_what_is_the_case_anyway_is_accepted(said: str) -> None:
    """C1, G5: the settings that every example of peft and trl has."""
    plain, _ = read(GOOD)
    fields, warnings = read(GOOD + f"train:\n  {said}\n")
    assert fields == plain
    assert warnings and all(one.endswith("says what is the case anyway; leave it out") for one in warnings)


@pytest.mark.parametrize(
    ("said", "field", "value"),
    [
        ("bf16: false\n  fp16: false", "train.dtype", "fp32"),
        ("bf16: true\n  fp16: false", "train.dtype", "bf16"),
        ("load_in_8bit: true", "train.method", "int8"),
        ("bnb_4bit_quant_type: fp4", "train.four_bit_type", "fp4"),
        ("bnb_4bit_use_double_quant: false", "train.double_quantization", False),
        ("attn_implementation: eager", "train.attention", "eager"),
        ("eval_steps: 5\n  early_stopping_patience: 3", "train.patience", 3),
        ("load_best_model_at_end: true", "train.keep", "best"),
        ("auto_find_batch_size: true", "train.batch_size", "auto"),
        ("warmup_steps: 5", "train.warmup_steps", 5),
        ("lora: {init_lora_weights: olora}", "train.lora.init", "olora"),
        ("lora: {target_modules: q_proj}", "train.lora.targets", ["q_proj"]),
    ],
)
def test_settings_that_have_a_field(said: str, field: str, value: object) -> None:
    """A4, A5, C4, G1, G3, G5, G6, H1."""
    assert read(GOOD + f"train:\n  {said}\n")[0][field] == value


@pytest.mark.training
@pytest.mark.filterwarnings("ignore:.*experimental")
def test_every_setting_of_the_installed_libraries_has_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field, a name of another that means it, or a sentence: never an unknown key."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    import peft
    import transformers
    import trl
    from trl.experimental.orpo import ORPOConfig

    classes: tuple[Any, ...] = (
        transformers.TrainingArguments, trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, ORPOConfig,
        peft.LoraConfig,
    )  # fmt: skip
    settings = {field.name for each in classes for field in dataclasses.fields(each)}
    settings |= inspect.signature(transformers.BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    assert sorted(settings - OLD_NAMES.keys() - {*names_in("train"), *names_in("train.lora")}) == []


@pytest.mark.parametrize(
    "said", ["bias: all", "bias: [none]", "task_type: SEQ_CLS", "peft_type: IA3", "task_type: {a: 1}"]
)
def test_what_is_not_the_case_is_refused(said: str) -> None:
    """C8, pitfall 37."""
    [problem] = refused(GOOD + f"train:\n  lora: {{{said}}}\n")
    assert "is not a field" in problem


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("rag", "retrieval (RAG) is out of scope"),
        ("reward_funcs", "rewards (RLHF, PPO, GRPO) are out of scope"),
        ("num_virtual_tokens", "prefix and prompt tuning are out of scope"),
        ("feedforward_modules", "IA3 is out of scope"),
        ("onnx", "ONNX is out of scope"),
        ("runpod", "forge rents no machine"),
        ("colab", "forge rents no machine"),
        ("gguf_my_repo", "GGUF-my-repo is not needed"),
    ],
)
def test_what_is_out_of_scope_says_so(key: str, words: str) -> None:
    """Section 4 of the requirements."""
    [problem] = refused(GOOD + f"{key}: true\n")
    assert f"is not a field: {words}" in problem


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("train: {method: ia3}", "IA3 is out of scope"),
        ("train: {method: Prefix-Tuning}", "prefix and prompt tuning are out of scope"),
        ("train: {objective: grpo}", "rewards (RLHF, PPO, GRPO) are out of scope"),
        ("export: {quant: onnx}", "ONNX is out of scope"),
        ("export: {quant: gptq}", "for other servers than llama.cpp"),
        ("deploy: {runtime: runpod}", "forge rents no machine"),
        ("deploy: {runtime: vllm}", "export.keep_merged: true"),
    ],
)
def test_what_is_out_of_scope_says_so_as_a_value_too(said: str, words: str) -> None:
    """Section 4 of the requirements."""
    [problem] = refused(f"{GOOD}{said}\n")
    assert words in problem


@pytest.mark.parametrize(
    ("said", "field", "value"),
    [
        ("stage: dpo", "train.objective", "dpo"),
        ("pref_beta: 0.2", "train.beta", 0.2),
        ("quantization_bit: 4", "train.method", "qlora"),
        ("full_finetuning: true", "train.method", "full"),
        ("use_unsloth: true", "train.backend", "unsloth"),
        ("neat_packing: true", "train.packing", True),
        ("mask_history: true", "train.supervise", "last"),
        ("chat_template_path: chatml", "base.chat_template", "chatml"),
        ("rl: kto", "train.objective", "kto"),
        ("eager_attention: true", "train.attention", "eager"),
        ("use_wandb: true", "train.report_to", ["wandb"]),
        ("early_stopping_steps: 3\n  eval_steps: 5", "train.patience", 3),
        ("clip_grad_norm: 0.5", "train.max_gradient_norm", 0.5),
        ("quantize_base: true", "train.method", "qlora"),
        ("system_prompt: Be brief.", "model.system", "Be brief."),
        ("excess_length_strategy: drop", "data.overlong", "drop"),
    ],
)
def test_names_of_other_tools(said: str, field: str, value: object) -> None:
    fields, warnings = read(GOOD + f"train:\n  {said}\n")
    assert fields[field] == value and field in warnings[0]


def test_a_name_that_is_meant_in_one_section_only() -> None:
    found, _ = read(GOOD.replace("{source: builtin:yoda}", "{path: builtin:yoda, type: chat_template}"))
    assert (found["data.source"], found["data.format"]) == ("builtin:yoda", "messages")
    assert "unknown key" in refused(GOOD + "train: {type: chat_template}\n")[0]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("{path: builtin:yoda}", "unknown key; did you mean source?"),
        ("{source: builtin:yoda, shards: 2}", "is not a field: data.split names one of a data set's sets"),
    ],
)
def test_an_item_of_a_list_has_the_same_answers(item: str, words: str) -> None:
    said = refused(GOOD.replace("{source: builtin:yoda}", f"{{source: [{item}]}}"))
    assert any(words in one for one in said)


def test_a_list_of_one_value_is_that_value() -> None:
    _, warnings = read(GOOD + "train: {roles_to_train: [assistant]}\n")
    assert warnings[0].endswith("says what is the case anyway; leave it out")
    assert "has a counterpart" in refused(GOOD + "train: {roles_to_train: [assistant, user]}\n")[0]


def test_a_variable_of_the_template_may_have_any_name() -> None:
    found, warnings = read(GOOD + "train: {template_variables: {lora_r: 1, tokenizer: x}}\n")
    assert found["train.template_variables"] == {"lora_r": 1, "tokenizer": "x"}
    assert warnings == ()


@pytest.mark.parametrize("name", [name for name, old in OLD_NAMES.items() if old.new])
def test_every_old_name_leads_to_a_field(name: str) -> None:
    old = OLD_NAMES[name]
    assert not old.why and old.new in all_names()
    assert old.new.rpartition(".")[2] != name or old.new.count(".") < 2
    for value, new in (old.values or {}).items():
        if new is not DROP:
            written = str(value).lower() if isinstance(value, bool) else value
            whole = ["train.method=lora"] if "pissa" in f"{name} {value}" else []  # as PiSSA needs it
            found, warnings = read(GOOD, f"{name}={written}", *whole)
            assert found[old.new] == ([new] if old.new == "train.report_to" else new)
            assert f"-o {name}: {name} is now {old.new}" in warnings


def test_every_other_old_name_says_why_not() -> None:
    answered = {name: old for name, old in OLD_NAMES.items() if not old.new}
    # Some are a field of the section above.
    keys = {name: f"train.{'lora.' * (name in names_in('train'))}{name}" for name in answered}
    keys |= {name: name for name in answered if "." in name}
    said = refused(GOOD, *(f"{key}=1" for key in keys.values()))
    assert said == [f"-o {keys[name]}: is not a field: {old.why}" for name, old in answered.items()]
    assert [fields_in(old.why) for old in answered.values()] == [[]] * len(answered)


def test_an_answer_to_the_name_of_a_field_names_that_field() -> None:
    """At the top level or in another section: `revision: main` is base.revision."""
    fields = {name.rpartition(".")[2]: name for name in sorted(all_names(), reverse=True)}
    answers = {name: old.why for name, old in OLD_NAMES.items() if not old.new and name in fields}
    assert {name: why for name, why in answers.items() if fields[name] not in why} == {}
    assert "base.revision" in answers["revision"]


def test_no_name_has_two_answers() -> None:
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    lines = [*table["renamed"].values(), *(entry["names"] for entry in table["valued"] + table["answered"])]
    names = " ".join(lines).split()
    assert sorted(names) == sorted({*names}) == sorted(OLD_NAMES)


def test_names_that_todays_libraries_refuse_are_all_known() -> None:
    """What TrainingArguments and SFTConfig of today refuse, and older scripts still write."""
    refused_today = (
        "max_seq_length evaluation_strategy warmup_ratio logging_dir overwrite_output_dir tokenizer "
        "group_by_length no_cuda save_safetensors jit_mode_eval use_ipex torchdynamo push_to_hub_token "
        "dataset_batch_size num_of_sequences chars_per_token use_liger half_precision_backend "
        "include_tokens_per_second ray_scope mp_parameters past_index per_gpu_train_batch_size sharded_ddp "
        "evaluation_steps gradient_checkpointing_kw_args torch_dtype load_in_4bit predict_with_generate"
    )
    assert set(refused_today.split()) <= OLD_NAMES.keys()


ARGUMENTS = (Path(__file__).parent / "cases" / "document_arguments.txt").read_text(encoding="utf-8")


def test_every_argument_of_the_documents_scripts_is_answered() -> None:
    """D0 to D3, section 2's A to R: each is a field, is renamed, or is answered where it is typed."""
    unanswered = []
    for argument in ARGUMENTS.splitlines():
        text = GOOD + f"train:\n  {argument}\n"
        try:
            read(text)
        except RecipeError as failure:
            words = [problem.message for problem in failure.problems]
            unanswered += [argument for word in words if "unknown key" in word and "did you mean" not in word]
    assert unanswered == []
