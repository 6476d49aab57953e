"""Which stages' requests each field of the recipe enters: the table, field by field.

A field that is missing from a request leaves an old artifact in its place, in silence; one too many makes
work again that nobody asked for. What a stage takes from others comes by their digests, and is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from forge.recipe.fields import all_names
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.stages import stages_for
from forge.store.artifacts import Store
from tests.models import make_model

RECIPE = (
    "name: mini\nbase: builtin:tiny\n"
    "data: {source: builtin:yoda, columns: {prompt: sentence, completion: translation_extra}, eval: 4}\n"
)
NOWHERE: tuple[str, ...] = ()
# Those of whatever changes the chat template.
TEMPLATE = ("data", "train", "export", "modelfile", "verify")
# Field, another value than RECIPE's, and the stages whose requests it enters.
TABLE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("name", "other", ("modelfile",)),
    ("base.trust_remote_code", "true", NOWHERE),  # of a family that transformers has
    ("base.tokens.add", "[<|note|>]", ("data", "train", "export", "modelfile", "verify")),
    ("base.tokens.pad", "<|im_end|>", ("data", "train", "export", "modelfile", "verify")),
    ("data.encoding", "utf-8", ("data",)),
    ("data.eval", "8", ("data",)),
    ("data.format", "prompt", ("data",)),
    ("data.ignore", "[style]", ("data",)),
    ("data.limit", "50", ("data",)),
    ("data.overlong", "drop", ("data",)),
    ("data.seed", "7", ("data",)),
    ("data.skip_bad_rows", "3", ("data",)),
    ("train.adam_beta1", "0.8", ("train",)),
    ("train.adam_beta2", "0.98", ("train",)),
    ("train.adam_epsilon", "1e-6", ("train",)),
    ("train.attention", "eager", ("train", "evaluate")),
    ("train.backend", "unsloth", ("train",)),
    ("train.batch_size", "3", ("train",)),
    ("train.checkpoint_minutes", "9", NOWHERE),
    ("train.compile", "true", ("train",)),
    ("train.device", "cpu", ("train", "evaluate")),
    ("train.devices", "2", ("train",)),
    ("train.devices", "[5]", NOWHERE),  # one as well, whichever
    ("train.double_quantization", "false", ("train", "evaluate")),
    ("train.dtype", "fp32", ("train", "evaluate")),
    ("train.epochs", "9", ("train",)),
    ("train.evaluation_steps", "5", ("train",)),
    ("train.four_bit_type", "fp4", ("train", "evaluate")),
    ("train.gradient_accumulation", "5", ("train",)),
    ("train.gradient_checkpointing", "true", ("train",)),
    ("train.keep", "last", ("train",)),
    ("train.learning_rate", "5e-4", ("train",)),
    ("train.length_groups", "true", ("train",)),
    ("train.liger", "true", ("train",)),
    ("train.lora.alpha", "77", ("train",)),
    ("train.lora.alpha_pattern", "{q_proj: 8}", ("train",)),
    ("train.lora.dora", "true", ("train",)),
    ("train.lora.dropout", "0.2", ("train",)),
    ("train.lora.init", "gaussian", ("train",)),
    ("train.lora.layers", "[1]", ("train",)),
    ("train.lora.modules_to_save", "[embed_tokens]", ("train",)),
    ("train.lora.r", "5", ("train",)),
    ("train.lora.rank_pattern", "{q_proj: 4}", ("train",)),
    ("train.lora.rslora", "true", ("train",)),
    ("train.lora.targets", "[q_proj]", ("train",)),
    ("train.beta", "0.5", ("train",)),
    ("train.max_gradient_norm", "0.5", ("train",)),
    ("train.max_length", "40", ("data",)),
    ("train.max_steps", "3", ("train",)),
    ("train.method", "lora", ("train", "evaluate", "export", "verify")),
    ("train.neftune_alpha", "5", ("train",)),
    ("train.offload_activations", "true", NOWHERE),
    ("train.nodes", "2", ("train",)),
    ("train.objective", "dpo", ("data", "train", "evaluate")),
    ("train.optimizer", "adafactor", ("train",)),
    ("train.packing", "true", ("train",)),
    ("train.preset", "t4", ("data", "train", "evaluate")),
    ("train.quant_storage", "float32", ("train", "evaluate")),
    ("train.retry_smaller", "true", NOWHERE),
    ("train.schedule", "linear", ("train",)),
    ("train.schedule_options", "{num_cycles: 2}", ("train",)),
    ("train.seed", "9", ("train",)),
    ("train.supervise", "last", ("data",)),
    ("train.template_variables", "{today: 2020-01-01}", ("data", "modelfile")),
    ("train.warmup_fraction", "0.3", ("train",)),
    ("train.warmup_steps", "3", ("train",)),
    ("train.weight_decay", "0.3", ("train",)),
    ("model.messages", "[{role: user, content: a}, {role: assistant, content: b}]", TEMPLATE),
    ("model.sampling.min_p", "0.1", ("export", "modelfile")),
    ("model.sampling.repetition_penalty", "1.1", ("export", "modelfile")),
    ("model.sampling.temperature", "0.3", ("export", "modelfile")),
    ("model.sampling.top_k", "9", ("export", "modelfile")),
    ("model.sampling.top_p", "0.3", ("export", "modelfile")),
    ("model.system", "Speak like Yoda.", TEMPLATE),
    ("export.imatrix", "true", ("calibrate", "export")),
    ("export.keep_merged", "true", ("export",)),
    ("export.merge_base", "nf4", ("export",)),
    ("export.mode", "adapter", ("export",)),
    ("export.quant", "q8_0", ("export", "modelfile")),
    ("export.quant", "[q4_k_m, q8_0]", ("export-q8_0", "modelfile-q8_0", "verify-q8_0")),
    ("deploy.context_tokens", "256", ("modelfile",)),
    ("deploy.host", "0.0.0.0", NOWHERE),
    ("deploy.keep", "true", NOWHERE),
    ("deploy.parallel", "3", NOWHERE),
    ("deploy.port", "8123", NOWHERE),
    ("deploy.runtime", "none", NOWHERE),
    ("deploy.threads", "1", NOWHERE),
    ("deploy.without_key", "true", NOWHERE),
    ("verify.as_trained", "warn", NOWHERE),
    ("verify.learned", "off", NOWHERE),
    ("verify.max_kl", "0.5", NOWHERE),
    ("verify.min_top1", "0.5", NOWHERE),
    ("verify.minutes", "3", NOWHERE),
)
# Sections, what has one value that is taken, and what names files or hub ids: their digests enter, which
# other tests change.
ELSEWHERE = (
    "base", "base.chat_template", "base.id", "base.revision", "base.tokens", "data", "data.columns",
    "data.revision", "data.roles", "data.source", "data.split", "deploy", "deploy.gpu_layers", "export",
    "export.quant.max_kl", "model", "model.sampling", "smoke", "train", "train.continue_from", "train.from",
    "train.lora", "train.lora.experts", "train.lora.token_indices", "train.patience", "train.report_to",
    "train.revision", "train.strategy", "verify",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("requests")
    (directory / "recipe.yaml").write_text(RECIPE)
    return directory


def _requests(place: Path, *overrides: str) -> Mapping[str, str]:
    """The parameters of each stage that keeps what it made."""
    loaded = load(place / "recipe.yaml", overrides)
    ship = resolve_recipe(loaded, Store(place / "home"), place / "runs" / "mini", offline=True)
    made = {stage.name: stage.params() for stage in stages_for(ship) if hasattr(stage, "params")}
    return {name: json.dumps(params, sort_keys=True) for name, params in made.items()}


@pytest.fixture(scope="module")
def before(place: Path) -> Mapping[str, str]:
    return _requests(place)


@pytest.mark.parametrize(("field", "value", "stages"), TABLE, ids=[row[0] for row in TABLE])
def test_a_field_enters_the_requests_of_its_stages_only(
    field: str, value: str, stages: tuple[str, ...], place: Path, before: Mapping[str, str]
) -> None:
    after = _requests(place, f"{field}={value}")
    assert tuple(name for name in after if after[name] != before.get(name)) == stages


def test_each_objective_is_another_request_of_training(place: Path) -> None:
    """Those that compare take the same rows, so nothing but the objective tells their adapters apart."""
    requests = [_requests(place, f"train.objective={name}") for name in ("dpo", "orpo", "kto")]
    assert len({request["train"] for request in requests}) == len(requests)


def test_patience_is_part_of_the_request_of_a_training_that_evaluates(place: Path) -> None:
    evaluates = "train.evaluation_steps=5"
    assert _requests(place, evaluates)["train"] != _requests(place, evaluates, "train.patience=3")["train"]


@pytest.mark.training
def test_experts_are_part_of_the_request_of_a_training_that_can_have_them(
    place: Path, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", "mixtral", "home-made")
    fits = (f"base.id={base}", "train.method=lora", "train.lora.dropout=0")
    assert _requests(place, *fits)["train"] != _requests(place, *fits, "train.lora.experts=true")["train"]


def test_the_weight_of_a_source_enters_the_request_of_the_data(tmp_path: Path) -> None:
    """Of several sources each has its own."""
    requests = []
    for weight in ("1", "2"):
        one, two = (
            f"{{source: builtin:yoda, columns: {{prompt: sentence, completion: {answer}}}, weight: {own}}}"
            for answer, own in (("translation_extra", "1"), ("translation", weight))
        )
        text = f"name: mini\nbase: builtin:tiny\ndata: {{source: [{one}, {two}], eval: 4}}\n"
        (tmp_path / "recipe.yaml").write_text(text)
        requests.append(_requests(tmp_path))
    first, second = requests
    assert [name for name in first if first[name] != second[name]] == ["data"]


def test_every_field_of_the_schema_is_in_the_table() -> None:
    known = {*(row[0] for row in TABLE), *ELSEWHERE}
    leaves = {name for name in all_names() if "*" not in name and not name.startswith("data.columns.")}
    assert leaves - known == set()
    assert known - leaves == set()
