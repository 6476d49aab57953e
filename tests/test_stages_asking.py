"""What each stage asks of its worker, the whole request, and what it puts into the run.

The worker is a stand-in that keeps what it is asked; what it would do is tested where that is. The ship, its
rows and the files that are published are real.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from forge import worker
from forge.adapter.status import Validated
from forge.chat.hand_over import LeftOut
from forge.chat.same_prompts import ComparedPrompts
from forge.codec import to_plain
from forge.data.account import Prepared
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE
from forge.errors import CheckError, MissingToolError
from forge.export.checkpoint import Merged
from forge.export.rehearsal import Rehearsed
from forge.export.request import Exported
from forge.export.run import ADAPTER_FILE, GGUF_FILE, MERGED_DIRECTORY
from forge.recipe.load import load
from forge.recipe.quants import BUDGETED
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.runs.files import of_type
from forge.stages.calibrate import CalibrateStage
from forge.stages.data import DataStage
from forge.stages.evaluate import EvaluateStage
from forge.stages.export import ExportStage
from forge.stages.merge import MergeStage
from forge.stages.modelfile import ModelfileFacts, Variables
from forge.stages.train import TrainStage
from forge.stages.validate import ValidateStage
from forge.stages.verify import VerifyStage, shared_by_types
from forge.store.artifacts import Artifact, Store
from forge.train.arithmetic import Arithmetic
from forge.train.memory import choose_batch
from forge.train.request import Trained
from forge.verify.bases import BaseLosses, ChosenBase
from forge.verify.basis import read_certificate, write_rows
from forge.verify.calibrate import IMPORTANCE_FILE
from forge.verify.calibration import Calibrated, Importance
from forge.verify.measurement import Gates
from tests.conftest import copy_of_tiny, link_converters
from tests.models import evaluated
from tests.test_verify_maths import _measurement as measurement

WIDTH = 256
SAMPLE = (
    "{source: builtin:yoda, columns: {prompt: sentence, completion: translation_extra}, limit: 24, eval: 4}"
)
RECIPE = f"""
name: mini
base: {{id: ./base, trust_remote_code: true}}
data: {SAMPLE}
train: {{method: qlora, batch_size: 4, seed: 3, max_length: 64}}
model: {{sampling: {{temperature: 0.5}}}}
"""
EXPORTED = Exported("llama", "q8_0", 1, {}, {}, 8.5, "merged", (), 1, (), 40, (), None, None, 1, 0.1)
EXPORT_FACTS: dict[str, Any] = {**to_plain(EXPORTED), "merge_base": "nf4", "merge_base_measured": None}
MODELFILE_FACTS: dict[str, Any] = to_plain(
    ModelfileFacts(
        "proved", ("<|im_end|>",), (), None, 512, {}, 0, None, (), (), LeftOut(), "Modelfile", None,
        ComparedPrompts(200, ("the training tokenizer",)), Variables((), {}),
    )
)  # fmt: skip
CALIBRATED = Calibrated(Importance(1, 20, 400, 0))
TRAINED = Trained(
    1, 1.0, 2.0, 10, 100, {}, "qlora", "cpu", "float32", Arithmetic("float32", "float32"), "sdpa", 1, "AVX2",
    (), None, False, None,
)  # fmt: skip
ANSWERS: Mapping[str, Any] = {
    "rehearse": Rehearsed(1, 1, 40),
    "train": TRAINED,
    "validate": Validated(True, {}, (), (), None, False, True, (), 2.0, 1, (), ("merged",)),
    "evaluate": evaluated(3.0, 1.0),
    "calibrate": CALIBRATED,
    "choose_base": ChosenBase("nf4", "it answers better", BaseLosses(2.0, 1.0), 0.1, 0.1, 4, 40),
    "export": EXPORTED,
    "merge": Merged(1, 1, 0.1),
    "verify": measurement(),
}


@dataclass
class Asked:
    """What the worker was asked, task by task, and where it was to write its log."""

    requests: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    logs: set[Path | None] = field(default_factory=set)

    def call(
        self, task: str, arguments: Mapping[str, Any], *, log: Path | None = None, together: Any = ({},)
    ) -> Any:
        assert together == ({},)  # one worker
        self.requests[task] = arguments
        self.logs.add(log)
        return to_plain(ANSWERS[task])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    kept = Asked()
    monkeypatch.setattr(worker, "call", kept.call)
    return kept


@dataclass(frozen=True)
class Place:
    """A ship of a base with code of its own, and what the stages before made."""

    directory: Path
    ship: Resolved

    @property
    def out(self) -> Path:
        path = self.directory / "out"
        path.mkdir(exist_ok=True)
        return path

    @property
    def inputs(self) -> dict[str, Artifact]:
        data, facts = self.directory / "data", {}
        if self.ship.recipe.data is not None and not data.exists():
            data.mkdir()
            (data / "facts.json").write_text(json.dumps(to_plain(DataStage(self.ship).build({}, data))))
        if data.exists():
            facts = json.loads((data / "facts.json").read_text())
        made = {
            "data": ("data", facts),
            "train": ("adapter", {"adopted_from": "elsewhere"}),
            "calibrate": ("matrix", CALIBRATED.facts()),
            "export": ("exported", EXPORT_FACTS),
        }
        return {
            name: Artifact(name, "key", "digest", self.directory / path, facts)
            for name, (path, facts) in made.items()
        }

    def inputs_of(self, *names: str) -> dict[str, Artifact]:
        return {name: one for name, one in self.inputs.items() if name in names}

    @property
    def ingredients(self) -> dict[str, Any]:
        """What every GGUF of this ship is made of."""
        ship = self.ship
        return {
            "base": str(self.directory / "base"),
            "adapter": str(self.directory / "adapter"),
            "tokenizer": str(ship.tokenizer.directory),
            "chat_template": ship.template.pinned_source(),
            "converters": str(next((self.directory / "home" / "tools").glob("llama.cpp-*"))),
            "end_of_turn_id": ship.prompt_format.end_of_turn_id,
            "merge_base": "original",
            "sampling": {"temperature": 0.5},
        }


def place_of(directory: Path, recipe: str = RECIPE) -> Place:
    if not (directory / "base").exists():
        copy_of_tiny(directory / "base")
        link_converters(directory / "home")
    (directory / "recipe.yaml").write_text(recipe)
    run = directory / "runs" / "mini"
    ship = resolve_recipe(load(directory / "recipe.yaml"), Store(directory / "home"), run, offline=True)
    own = replace(ship.configuration, model_type="own", remote_code=True)
    ship.__dict__["configuration"] = own
    return Place(directory, ship)


def write_adapter(directory: Path, value: float = 1.0, *, norm: bool = False) -> Path:
    """A LoRA of one layer of `builtin:tiny`, rank 1, all of whose numbers are `value`.

    `norm`: with the last norm trained whole, so that it is no adapter that could be left apart.
    """
    directory.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["o_proj"]}
    settings |= {"modules_to_save": ["norm"]} if norm else {}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.model.layers.0.self_attn.o_proj"
    shapes = {f"{module}.lora_A.weight": [1, WIDTH], f"{module}.lora_B.weight": [WIDTH, 1]}
    shapes |= {"base_model.model.model.norm.weight": [WIDTH]} if norm else {}
    starts = range(0, 4 * WIDTH * len(shapes), 4 * WIDTH)
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [start, start + 4 * WIDTH]}
        for start, (name, shape) in zip(starts, shapes.items(), strict=True)
    }
    text = json.dumps(header).encode()
    values = struct.pack("<f", value) * (WIDTH * len(shapes))
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + values)
    return directory


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_of(tmp_path)


def test_training_is_rehearsed_and_asked_for_whole(place: Place, asked: Asked) -> None:
    stage = TrainStage(place.ship)
    trained = stage.build(place.inputs, place.out)
    fields = [choice.field for choice in trained.choices]
    assert fields == ["train.liger", "train.compile", "train.offload_activations"]
    assert replace(trained, choices=()) == TRAINED
    assert list(asked.requests) == ["rehearse", "train"] and asked.logs == {place.ship.log}
    assert asked.requests["rehearse"]["trust_remote_code"] is True
    assert place.ship.training is not None
    assert asked.requests["train"] == {
        "settings": place.ship.training.model_dump(mode="json")
        | {"liger": False, "compile": False, "offload_activations": False},
        "batch_size": 4,
        "trust_remote_code": True,
        "max_length": place.inputs["data"].facts["max_length"],
        "continue_from": None,
        "pad_token": place.ship.pad_token,
        "rows": None,
        "tokenizer": str(place.ship.tokenizer.directory),
        "page": str(place.directory / "runs" / "mini" / "report.html"),
        "trackers": str(place.directory / "runs" / "mini" / "trackers"),
        "base": str(place.directory / "base"),
        "base_name": place.ship.base.spec,
        "base_revision": None,
        "data": str(place.directory / "data"),
        "out": str(place.out),
        "questions": [],
    }


def test_the_smoke_queries_are_questions_while_it_trains(tmp_path: Path, asked: Asked) -> None:
    """I2: as the server will be prompted with them, and only where held-out rows are measured meanwhile."""
    queries = "smoke: [{prompt: Is it red?, system: Be brief.}]\n"
    place = place_of(tmp_path, RECIPE.replace("seed: 3", "seed: 3, evaluation_steps: 5") + queries)
    TrainStage(place.ship).build(place.inputs, place.out)
    [question] = asked.requests["train"]["questions"]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it red?<|im_end|>\n"
    form = place.ship.prompt_format
    assert question == {
        "text": "Is it red?",
        "ids": form.ids(prompt + "<|im_start|>assistant\n"),
        "end_of_turn_id": form.end_of_turn_id,
        "pad_token_id": place.ship.pad_token_id,
    }


def test_a_batch_that_is_left_to_the_machine_is_chosen_by_the_longest_row(
    tmp_path: Path, asked: Asked
) -> None:
    place = place_of(tmp_path, RECIPE.replace("batch_size: 4", "batch_size: auto"))
    TrainStage(place.ship).build(place.inputs, place.out)
    training, longest = place.ship.training, place.inputs["data"].read(Prepared).longest_tokens
    assert training is not None
    batch = choose_batch(training, place.ship.tensors, place.ship.configuration, longest)
    assert asked.requests["train"]["batch_size"] == batch


def test_training_goes_on_from_the_adapter_that_is_named(tmp_path: Path, asked: Asked) -> None:
    continued = RECIPE.replace("seed: 3", "seed: 3, continue_from: earlier")
    write_adapter(tmp_path / "earlier")
    place = place_of(tmp_path, continued)
    stage = TrainStage(place.ship)
    stage.build(place.inputs, place.out)
    assert asked.requests["train"]["continue_from"] == str(tmp_path / "earlier")
    before = stage.params()["train.continue_from"]
    write_adapter(tmp_path / "earlier", value=2.0)
    assert TrainStage(place_of(tmp_path, continued).ship).params()["train.continue_from"] != before


def test_a_tracker_that_is_not_installed_is_said_before_anything_runs(tmp_path: Path) -> None:
    TrainStage(place_of(tmp_path).ship).require_tools()
    place = place_of(tmp_path, RECIPE.replace("seed: 3", "seed: 3, report_to: [flyte, dvclive]"))
    with pytest.raises(MissingToolError, match=r"train.report_to: flyte, dvclive is not installed") as absent:
        TrainStage(place.ship).require_tools()
    assert absent.value.hint == "pip install flytekit dvclive, or leave it out"


def test_validation_and_evaluation_are_asked_for_whole(place: Place, asked: Asked) -> None:
    ValidateStage(place.ship).build(place.inputs, place.out)
    EvaluateStage(place.ship).build(place.inputs, place.out)
    here = {"base": str(place.directory / "base"), "adapter": str(place.directory / "adapter")}
    assert asked.requests["validate"] == {**here, "trust_remote_code": True}
    loading = {
        "method": "qlora", "four_bit_type": "nf4", "double_quantization": True, "quant_storage": "uint8",
        "attention": "auto", "trust_remote_code": True, "seed": 3, "is_shared": False,
    }  # fmt: skip
    assert asked.requests["evaluate"] == {
        **here, "data": str(place.directory / "data"), "loading": loading, "device": "auto", "dtype": "auto",
        "end_of_turn_id": place.ship.prompt_format.end_of_turn_id, "pad_token_id": place.ship.pad_token_id,
        "beta": None,
        "tokenizer": str(place.ship.tokenizer.directory),
    }  # fmt: skip
    assert asked.logs == {place.ship.log}


def test_rows_of_which_none_is_held_out_are_not_evaluated(tmp_path: Path, asked: Asked) -> None:
    place = place_of(tmp_path, RECIPE.replace("eval: 4", "eval: 0"))
    assert EvaluateStage(place.ship).build(place.inputs, place.out) == {"rows": 0}
    assert asked.requests == {}


def test_calibration_is_asked_for_whole(tmp_path: Path, asked: Asked) -> None:
    place = place_of(tmp_path, RECIPE + "export: {quant: {max_kl: 0.01}, merge_base: nf4}\n")
    assert CalibrateStage(place.ship).build(place.inputs, place.out) == CALIBRATED.facts()
    data = place.directory / "data"
    assert asked.requests["calibrate"] == {
        "model": {**place.ingredients, "merge_base": "nf4"}, "rows": str(data / TRAIN_FILE),
        "measured_rows": str(data / HELDOUT_FILE), "out": str(place.out), "name": "base-tuned",
        "types": list(BUDGETED), "max_kl": 0.01, "plain": False, "threads": None,
    }  # fmt: skip
    assert asked.logs == {place.ship.log}
    before = CalibrateStage(place.ship).params()
    original = place_of(tmp_path, RECIPE + "export: {quant: {max_kl: 0.01}, merge_base: original}\n")
    assert CalibrateStage(original.ship).params() != before


def test_a_matrix_without_a_budget_is_measured_on_its_own_rows_where_none_is_held_out(
    tmp_path: Path, asked: Asked
) -> None:
    recipe = RECIPE.replace("eval: 4", "eval: 0") + "export: {quant: q4_k_m, imatrix: true}\n"
    place = place_of(tmp_path, recipe)
    CalibrateStage(place.ship).build(place.inputs, place.out)
    request = asked.requests["calibrate"]
    assert request["measured_rows"] == request["rows"] == str(place.directory / "data" / TRAIN_FILE)
    assert (request["types"], request["max_kl"]) == ([], None)
    assert request["model"] == place.ingredients


def test_an_export_asks_which_base_answers_better_and_merges_into_that(place: Place, asked: Asked) -> None:
    facts = ExportStage(place.ship).build(place.inputs_of("data", "train"), place.out)
    assert list(asked.requests) == ["choose_base", "export"] and asked.logs == {place.ship.log}
    assert asked.requests["choose_base"] == {
        "base": str(place.directory / "base"),
        "adapter": str(place.directory / "adapter"),
        "rows": str(place.directory / "data" / HELDOUT_FILE),
        "rows_are": "held-out",
        "trust_remote_code": True,
    }
    assert asked.requests["export"] == {
        "model": {**place.ingredients, "merge_base": "nf4"}, "out": str(place.out), "name": "base-tuned",
        "quant": "q4_k_m", "mode": "merged", "data": str(place.directory / "data"), "importance": None,
        "keep_merged": False, "plain": False, "threads": None,
    }  # fmt: skip
    assert to_plain(facts) == {**EXPORT_FACTS, "merge_base_measured": to_plain(ANSWERS["choose_base"])}


def test_without_rows_the_bases_are_measured_on_built_in_ones(tmp_path: Path, asked: Asked) -> None:
    write_adapter(tmp_path / "theirs")
    recipe = "name: mini\nbase: ./base\ntrain: {from: ./theirs}\nexport: {merge_base: measured}\n"
    place = place_of(tmp_path, recipe)
    ExportStage(place.ship).build(place.inputs_of("train"), place.out)
    request = asked.requests["choose_base"]
    assert request["rows_are"] == "built-in" and Path(request["rows"]).stat().st_size > 1000
    assert asked.requests["export"]["data"] is None


def test_an_export_that_is_told_its_base_asks_nobody(tmp_path: Path, asked: Asked) -> None:
    chosen = "export: {quant: q4_k_m, merge_base: original, keep_merged: true, imatrix: true}\n"
    place = place_of(tmp_path, RECIPE + chosen)
    ExportStage(place.ship).build(place.inputs_of("data", "train", "calibrate"), place.out)
    assert list(asked.requests) == ["export"]
    request = asked.requests["export"]
    assert request["importance"] == str(place.directory / "matrix" / IMPORTANCE_FILE)
    assert (request["quant"], request["keep_merged"]) == ("q4_k_m", True)
    assert request["model"] == place.ingredients


def test_what_a_failed_export_left_is_cleared(
    place: Place, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(task: str, arguments: Mapping[str, Any], **_: Any) -> Any:
        (place.out / "work" / "merged").mkdir(parents=True)
        raise CheckError("llama.cpp reads other ids")

    monkeypatch.setattr(worker, "call", fail)
    recipe = RECIPE + "export: {merge_base: original}\n"
    with pytest.raises(CheckError, match="other ids"):
        ExportStage(place_of(place.directory, recipe).ship).build(place.inputs, place.out)
    assert list(place.out.iterdir()) == []


def test_a_merged_checkpoint_is_asked_for_whole(tmp_path: Path, asked: Asked) -> None:
    place = place_of(tmp_path, RECIPE + "export: {mode: none, merge_base: nf4}\n")
    stage = MergeStage(place.ship)
    assert stage.build(place.inputs, place.out) == Merged(1, 1, 0.1)
    of_gguf = {"converters", "end_of_turn_id"}
    expected = {name: value for name, value in place.ingredients.items() if name not in of_gguf}
    assert asked.requests["merge"] == {**expected, "merge_base": "nf4", "out": str(place.out)}
    assert asked.logs == {place.ship.log}


def test_certificates_of_several_types_share_what_is_made_of_the_same(tmp_path: Path, asked: Asked) -> None:
    """Gone when the ship ends, with or without a verdict; what is stopped goes on with it."""
    place = place_of(tmp_path, RECIPE + "export: {quant: [q4_k_m, q8_0]}\n")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / GGUF_FILE).write_bytes(b"GGUF")
    copy_of_tiny(tmp_path / "adapter")

    def shared(digest: str, quant: str | None) -> Path:
        inputs = place.inputs_of("data", "train", "export")
        inputs["train"] = replace(inputs["train"], digest=digest)
        VerifyStage(replace(place.ship, further_type=quant)).build(inputs, place.out)
        return Path(asked.requests["verify"]["shared"])

    first = shared("digest", None)
    assert shared("digest", "q8_0") == first != shared("another", None)
    endings: list[BaseException | None] = [None, CheckError("another file"), KeyboardInterrupt()]
    for ending in endings:
        with contextlib.suppress(CheckError, KeyboardInterrupt), shared_by_types(place.ship):
            first.mkdir(parents=True)
            if ending:
                raise ending
        assert first.exists() is isinstance(ending, KeyboardInterrupt)


def test_a_certificate_is_asked_for_whole(tmp_path: Path, asked: Asked) -> None:
    limits = "verify: {max_kl: 0.5, min_top1: 0.75, minutes: 3}\nexport: {quant: q4_k_m, imatrix: true}\n"
    place = place_of(tmp_path, RECIPE + limits)
    exported, matrix = tmp_path / "exported", tmp_path / "matrix"
    (exported / MERGED_DIRECTORY).mkdir(parents=True)
    matrix.mkdir()
    for path in (exported / GGUF_FILE, exported / ADAPTER_FILE, matrix / IMPORTANCE_FILE):
        path.write_bytes(b"GGUF")
    copy_of_tiny(tmp_path / "adapter")
    for path in (tmp_path / "base").glob("*.safetensors"):
        (exported / MERGED_DIRECTORY / path.name).write_bytes(path.read_bytes())
    (exported / MERGED_DIRECTORY / "config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    facts: Mapping[str, Any] = to_plain(VerifyStage(place.ship).build(place.inputs, place.out))
    assert asked.requests["verify"] == {
        **{name: value for name, value in place.ingredients.items() if name != "sampling"},
        "merge_base": "nf4", "gguf": str(exported / GGUF_FILE),
        "lora": str(exported / ADAPTER_FILE), "merged": str(exported / MERGED_DIRECTORY),
        "importance": str(matrix / IMPORTANCE_FILE), "rows": str(tmp_path / "data" / HELDOUT_FILE),
        "scratch": str(place.out / "work"), "f16": None, "trained_in_4bit": True, "trust_remote_code": True,
        "max_kl": 0.5, "min_top1": 0.75, "minutes": 3.0, "positions": None, "goes_on": True,
        "shared": None,
    }  # fmt: skip
    assert asked.logs == {place.ship.log} and (place.out / "work").is_dir()
    assert {option: item["where"] for option, item in facts["basis"]["items"].items()} == {
        "base": str(tmp_path / "base"), "gguf": "mini-q8_0.gguf", "adapter": "adapter",
        "lora": "mini-q8_0-adapter.gguf", "merged": "merged", "imatrix": f"calibration/{IMPORTANCE_FILE}",
    }  # fmt: skip
    further = tmp_path / of_type("certificate.json", "q8_0")
    further.write_text("of an earlier recipe")
    VerifyStage(place.ship).publish(Artifact("verify", "k", "d", place.out, facts), tmp_path, None)
    assert not further.exists()
    path = tmp_path / "certificate.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for part in ("basis", "gates", "evidence"):
        content[part]["of a later forge"] = 1
    path.write_text(json.dumps(content))
    kept = read_certificate(path)
    assert to_plain(kept.basis) == facts["basis"] and kept.gates == Gates(0.5, 0.75, True)
    held_out = (tmp_path / "data" / HELDOUT_FILE).read_text(encoding="utf-8").splitlines()
    again = write_rows(kept.evidence.rows, tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row) for row in again] == [json.loads(row) for row in held_out]
