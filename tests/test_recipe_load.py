"""Reading recipes that are right: values, sources, overrides, round trips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.errors import RecipeError
from forge.recipe.fields import values
from forge.recipe.load import Loaded, ValueSource, load
from forge.recipe.schema import Adopted, Base, Columns, Recipe, SmokeQuery, Train, recipe_from_json

CONTRACT = """\
name: yoda
base: microsoft/Phi-3-mini-4k-instruct   # hub id[@revision] · directory · builtin:tiny
data:
  source: data/yoda.jsonl                # jsonl json csv parquet · hub id · builtin:yoda
  columns: {prompt: sentence, completion: translation_extra}
  eval: 0.1
train: {method: qlora, epochs: 10,      # or {from: ADAPTER_DIR or hub id}, or none: ship a plain base
         learning_rate: 3e-4, max_length: 64, lora: {r: 16, alpha: 32, targets: auto}}
export: {mode: merged, quant: q4_k_m}
verify: {}                               # gates: see the certificate; absolute limits only when set here
deploy: {runtime: embedded}              # embedded · llama-server · container · ollama · none
smoke:
  - prompt: There is bacon in this sandwich.
    expect: (?i)^in this sandwich
"""
SMALL = "name: small\nbase: builtin:tiny\ndata: {source: builtin:yoda}\n"
DEFAULTS: dict[str, object] = {
    "name": "small",
    "base.id": "builtin:tiny",
    "base.revision": None,
    "base.trust_remote_code": False,
    "base.chat_template": None,
    "base.tokens.add": [],
    "base.tokens.pad": None,
    "data.source": "builtin:yoda",
    "data.revision": None,
    "data.split": "train",
    "data.format": "auto",
    "data.columns.prompt": None,
    "data.columns.completion": None,
    "data.columns.system": None,
    "data.columns.input": None,
    "data.columns.history": None,
    "data.columns.reasoning": None,
    "data.columns.chosen": None,
    "data.columns.tools": None,
    "data.columns.messages": None,
    "data.columns.text": None,
    "data.columns.rejected": None,
    "data.columns.label": None,
    "data.roles": {},
    "data.ignore": [],
    "data.encoding": None,
    "data.skip_bad_rows": 0,
    "data.eval": 0.1,
    "data.seed": 42,
    "data.limit": None,
    "data.overlong": "error",
    "train.preset": None,
    "train.objective": "sft",
    "train.devices": 1,
    "train.nodes": 1,
    "train.strategy": "ddp",
    "train.backend": "trl",
    "train.compile": "auto",
    "train.liger": "auto",
    "train.offload_activations": "auto",
    "train.beta": 0.1,
    "train.retry_smaller": False,
    "train.continue_from": None,
    "train.method": "qlora",
    "train.four_bit_type": "nf4",
    "train.double_quantization": True,
    "train.quant_storage": "uint8",
    "train.attention": "auto",
    "train.epochs": 3.0,
    "train.max_steps": None,
    "train.learning_rate": 2e-4,
    "train.schedule": "cosine",
    "train.schedule_options": {},
    "train.warmup_fraction": 0.03,
    "train.warmup_steps": None,
    "train.batch_size": 8,
    "train.gradient_accumulation": 1,
    "train.max_length": None,
    "train.lora.r": 16,
    "train.lora.alpha": 32,
    "train.lora.dropout": 0.05,
    "train.lora.targets": "auto",
    "train.lora.rank_pattern": {},
    "train.lora.alpha_pattern": {},
    "train.lora.layers": [],
    "train.lora.init": "default",
    "train.lora.token_indices": [],
    "train.lora.rslora": False,
    "train.lora.dora": False,
    "train.lora.experts": False,
    "train.lora.modules_to_save": [],
    "train.optimizer": "adamw_torch",
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_epsilon": 1e-8,
    "train.neftune_alpha": None,
    "train.weight_decay": 0.0,
    "train.max_gradient_norm": 1.0,
    "train.gradient_checkpointing": "auto",
    "train.dtype": "auto",
    "train.device": "auto",
    "train.packing": False,
    "train.length_groups": False,
    "train.evaluation_steps": None,
    "train.patience": None,
    "train.keep": "best",
    "train.supervise": "all",
    "train.template_variables": {},
    "train.checkpoint_minutes": 5.0,
    "train.seed": 42,
    "train.report_to": [],
    "export.mode": "merged",
    "export.merge_base": "auto",
    "export.quant": "q4_k_m",
    "model.system": None,
    "model.messages": [],
    "model.sampling.temperature": None,
    "model.sampling.top_p": None,
    "model.sampling.top_k": None,
    "model.sampling.min_p": None,
    "model.sampling.repetition_penalty": None,
    "export.imatrix": False,
    "export.keep_merged": False,
    "verify.learned": "required",
    "verify.max_kl": None,
    "verify.min_top1": None,
    "verify.minutes": None,
    "verify.as_trained": "required",
    "deploy.runtime": "embedded",
    "deploy.keep": False,
    "deploy.host": "127.0.0.1",
    "deploy.port": 0,
    "deploy.context_tokens": None,
    "deploy.parallel": None,
    "deploy.threads": None,
    "deploy.gpu_layers": None,
    "deploy.without_key": False,
    "smoke": [],
}


def loaded(directory: Path, text: str, *overrides: str) -> Loaded:
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, overrides)


def test_the_recipe_of_the_contract(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "yoda.jsonl").touch()
    found = loaded(tmp_path, CONTRACT)
    recipe = found.recipe
    assert recipe.base == Base(id="microsoft/Phi-3-mini-4k-instruct")
    assert recipe.data is not None
    assert recipe.data.columns == Columns(prompt="sentence", completion="translation_extra")
    assert isinstance(recipe.train, Train)
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.train.max_length) == (10.0, 3e-4, 64)
    assert recipe.smoke == (
        SmokeQuery(prompt="There is bacon in this sandwich.", expect="(?i)^in this sandwich"),
    )
    assert found.warnings == ()
    assert found.directory == tmp_path


def test_defaults_of_everything_but_name_base_and_data(tmp_path: Path) -> None:
    """C1 G2 G3: the defaults of a LoRA run; pitfall 45: its learning rate is not the libraries' 2e-5."""
    assert values(loaded(tmp_path, SMALL).recipe) == DEFAULTS


def test_every_value_knows_where_it_comes_from(tmp_path: Path) -> None:
    text = "name: a\nbase: org/model@abc\ndata:\n  source: builtin:yoda\n"
    text += "train:\n  lora:\n    r: 4\n    alpha: 8\n"
    found = loaded(tmp_path, text, "train.lora.r=8", "smoke=[{prompt: hi}]")
    file = str(tmp_path / "recipe.yaml")
    assert found.sources.keys() == values(found.recipe).keys()
    assert {name: source for name, source in found.sources.items() if source.kind != "default"} == {
        "name": ValueSource("recipe", f"{file}:1"),
        "base.id": ValueSource("recipe", f"{file}:2"),
        "base.revision": ValueSource("recipe", f"{file}:2"),
        "data.source": ValueSource("recipe", f"{file}:4"),
        "train.lora.r": ValueSource("override", "-o train.lora.r"),
        "train.lora.alpha": ValueSource("recipe", f"{file}:8"),
        "smoke.0.prompt": ValueSource("override", "-o smoke"),
    }


def test_comments_order_and_layout_do_not_change_a_recipe(tmp_path: Path) -> None:
    other = "# said\ndata:\n  source: 'builtin:yoda'   # why\n\nbase: {id: builtin:tiny}\n"
    other += 'name: "small"\ntrain: {}\n'
    assert loaded(tmp_path, other).recipe == loaded(tmp_path, SMALL).recipe
    assert loaded(tmp_path, SMALL, "train.seed=1").recipe != loaded(tmp_path, SMALL).recipe


@pytest.mark.parametrize("written", ["none", "null", "~", "'none'"])
def test_a_plain_base_needs_no_data(tmp_path: Path, written: str) -> None:
    recipe = loaded(tmp_path, f"name: a\nbase: org/model\ntrain: {written}\n").recipe
    assert recipe.train is None
    assert recipe.data is None


def test_an_adapter_made_elsewhere(tmp_path: Path) -> None:
    found = loaded(tmp_path, "name: a\nbase: org/model\ntrain:\n  from: org/adapter@v1\n")
    assert found.recipe.train == Adopted(source="org/adapter", revision="v1")
    assert found.sources["train.from"].where.endswith(":4")
    assert found.sources["train.revision"].where.endswith(":4")
    assert found.warnings == (
        f"{tmp_path}/recipe.yaml:4: train.from: without data nothing can show that the adapter "
        "does better than the base",
    )


@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        ("export: {quant: Q5_K_M}", "export.quant", "q5_k_m"),
        ("export: {quant: [Q5_K_M, f16]}", "export.quant", ["q5_k_m", "f16"]),
        ("verify: {learned: off}", "verify.learned", "off"),
        ("train: {learning_rate: 3e-4}", "train.learning_rate", 3e-4),
        ("train: {gradient_checkpointing: true}", "train.gradient_checkpointing", True),
        ("train: {epochs: 2}", "train.epochs", 2.0),
        ("train: {report_to: none}", "train.report_to", []),
        ("train: {report_to: tensorboard}", "train.report_to", ["tensorboard"]),
        ("train: {lora: {targets: [q_proj, v_proj]}}", "train.lora.targets", ["q_proj", "v_proj"]),
        (
            "train: {template_variables: {date: 2024-07-26}}",
            "train.template_variables",
            {"date": "2024-07-26"},
        ),
        ("train:\n  lora:\n", "train.lora.r", 16),
        ("verify:\ndeploy: {keep: true}", "deploy.keep", True),
    ],
)
def test_how_values_are_read(tmp_path: Path, written: str, field: str, value: object) -> None:
    read = values(loaded(tmp_path, SMALL + written + "\n").recipe)[field]
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize("value", [0, 60, 0.0, 0.25])
def test_held_out_rows_are_a_share_or_a_number(tmp_path: Path, value: float) -> None:
    recipe = loaded(tmp_path, SMALL, f"data.eval={value}").recipe
    assert recipe.data is not None
    assert (type(recipe.data.eval), recipe.data.eval) == (type(value), value)


def test_later_overrides_win_and_reach_sections_that_are_not_there(tmp_path: Path) -> None:
    overrides = (
        "train.epochs=1",
        "deploy.port=8080",
        "train.epochs=2",
        "base=org/model@v1",
        "name=x=y",
    )
    with pytest.raises(RecipeError) as refused:
        loaded(tmp_path, SMALL, *overrides)
    assert [problem.file for problem in refused.value.problems] == ["-o name"]
    recipe = loaded(tmp_path, SMALL, *overrides[:-1]).recipe
    assert isinstance(recipe.train, Train)
    assert (recipe.train.epochs, recipe.deploy.port, recipe.base.revision) == (2.0, 8080, "v1")


def test_an_override_mends_what_the_file_has_wrong(tmp_path: Path) -> None:
    assert loaded(tmp_path, SMALL + "train: {epochs: many}\n", "train.epochs=2").recipe.train == Train(
        epochs=2
    )
    assert loaded(tmp_path, SMALL + "train: none\n", "train={}").recipe.train == Train()


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert loaded(tmp_path, "\ufeff" + SMALL).recipe.name == "small"


def test_a_directory_with_an_at_sign_is_not_a_revision(tmp_path: Path) -> None:
    (tmp_path / "model@home").mkdir()
    recipe = loaded(tmp_path, SMALL, "base=./model@home").recipe
    assert recipe.base == Base(id="./model@home")


@pytest.mark.parametrize(
    ("override", "warning"),
    [
        (
            "train.learning_rate=2e-5",
            "-o train.learning_rate: 2e-05 is too low for LoRA, which often learns nothing below 5e-5; "
            "1e-4 to 3e-4 is usual",
        ),
        (
            "train.optimizer=paged_adamw_8bit",
            "-o train.optimizer: 8-bit states save next to nothing with LoRA: few parameters are trained",
        ),
        (
            "base.trust_remote_code=true",
            "-o base.trust_remote_code: runs the base's own Python code where transformers lacks its family",
        ),
    ],
)
def test_what_is_allowed_and_seldom_meant(tmp_path: Path, override: str, warning: str) -> None:
    """Pitfall 45 (low learning rate), pitfall 39 (8-bit optimizer), A12 (remote code)."""
    assert loaded(tmp_path, SMALL, override).warnings == (warning,)


def test_more_that_is_seldom_meant(tmp_path: Path) -> None:
    text = SMALL + "train: {epochs: 1, max_steps: 5}\ndeploy: {runtime: none}\nsmoke: [{prompt: hi}]\n"
    file = f"{tmp_path}/recipe.yaml"
    assert loaded(tmp_path, text).warnings == (
        f"{file}:4: train.epochs: is not used: train.max_steps decides",
        f"{file}:6: smoke: is not asked: deploy.runtime is none",
    )


words = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30
).filter(str.strip)
trains = st.builds(
    Train,
    epochs=st.floats(0.1, 1000),
    learning_rate=st.floats(1e-8, 1),
    batch_size=st.integers(1, 2**31 - 1),
    gradient_checkpointing=st.sampled_from(["auto", True, False]),
    template_variables=st.dictionaries(words, st.one_of(st.none(), st.booleans(), st.integers(), words)),
    report_to=st.sampled_from([(), ("wandb",), ("mlflow", "tensorboard")]),
)
recipes = st.builds(
    Recipe,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    base=st.builds(Base, id=st.just("org/model"), revision=st.none() | words),
    data=st.just({"source": "builtin:yoda"}),
    train=st.one_of(trains, st.none(), st.builds(Adopted, source=st.just("org/adapter"), revision=words)),
    smoke=st.lists(st.builds(SmokeQuery, prompt=words, max_tokens=st.integers(1, 99))).map(tuple),
)


@settings(deadline=None, max_examples=50)
@given(recipe=recipes)
def test_a_recipe_survives_json_and_the_file(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe
) -> None:
    written = json.dumps(recipe.as_json())
    assert recipe_from_json(json.loads(written)) == recipe
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(written, encoding="utf-8")  # JSON is YAML
    assert load(path).recipe == recipe
