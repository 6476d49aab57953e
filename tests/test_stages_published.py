"""What the stages put into a run, and what of an earlier ship they take out; what they need and refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.read import read_adapter
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE
from forge.errors import CheckError, DataError
from forge.export.run import ADAPTER_FILE, GGUF_FILE, MERGED_DIRECTORY
from forge.pipeline.stage import Result
from forge.stages import stages_for
from forge.stages.adopt import AdoptedFacts, AdoptStage
from forge.stages.calibrate import CalibrateStage
from forge.stages.data import DataStage
from forge.stages.export import ExportStage
from forge.stages.merge import MergeStage
from forge.stages.modelfile import ModelfileStage
from forge.stages.train import TrainStage
from forge.store.artifacts import Artifact
from forge.store.publication import Output
from forge.verify.calibrate import IMPORTANCE_FILE
from tests.conftest import tree
from tests.makers.tokenizer import CHATML
from tests.test_pipeline_stages import listen
from tests.test_stages_asking import (
    EXPORT_FACTS,
    MODELFILE_FACTS,
    RECIPE,
    SAMPLE,
    Place,
    place_of,
    write_adapter,
)
from tests.test_stages_deployed import ship_of
from tests.tiny_gguf import write_tiny_gguf

IMATRIX = "export: {quant: q4_k_m, imatrix: true}\n"


def artifact(directory: Path, digest: str, *names: str, **facts: Any) -> Artifact:
    """Of files that hold `digest` and their own name."""
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"{digest} {name}")
    outputs = {name: Output("", (directory / name).stat().st_size) for name in names}
    return Artifact("stage", "key", digest, directory, facts, outputs=outputs)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_of(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One that an earlier ship left: two models, an adapter, a merged checkpoint, a matrix."""
    directory = tmp_path / "run"
    earlier = ("mini-f16.gguf", "mini-f16-adapter.gguf", "merged/model.safetensors", "Modelfile")
    for name in (*earlier, "other-q8_0.gguf", f"calibration/{IMPORTANCE_FILE}"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("earlier")
    return directory


def files(run: Path) -> dict[str, str]:
    return {name: content.decode() for name, content in tree(run).items() if content is not None}


def test_one_model_takes_the_place_of_all_earlier_ones(place: Place, run: Path, tmp_path: Path) -> None:
    made = artifact(tmp_path / "a", "new", GGUF_FILE, **EXPORT_FACTS | {"quant": "q4_k_m"})
    ExportStage(place.ship).publish(made, run, None)
    assert files(run) == {"mini-q4_k_m.gguf": f"new {GGUF_FILE}", "Modelfile": "earlier"}
    result = Result("export", False, 0.0, made.facts, made)
    assert ExportStage(place.ship).summary(result, run) == {"gguf": str(run / "mini-q4_k_m.gguf")}


def test_a_model_its_adapter_its_checkpoint_and_its_matrix(tmp_path: Path, run: Path) -> None:
    stage, merged = ExportStage(place_of(tmp_path, RECIPE + IMATRIX).ship), f"{MERGED_DIRECTORY}/config.json"
    names, facts = (GGUF_FILE, ADAPTER_FILE, merged), {**EXPORT_FACTS, "merged_because": ["it has a bias"]}
    made = artifact(tmp_path / "a", "new", *names, **facts)
    stage.publish(made, run, None)
    assert files(run) == {
        "mini-q8_0.gguf": f"new {GGUF_FILE}",
        "mini-q8_0-adapter.gguf": f"new {ADAPTER_FILE}",
        merged: f"new {merged}",
        "Modelfile": "earlier",
        f"calibration/{IMPORTANCE_FILE}": "earlier",
    }
    assert stage.summary(Result("export", False, 0.0, facts, made), run) == {
        "gguf": str(run / "mini-q8_0.gguf"),
        "adapter_gguf": str(run / "mini-q8_0-adapter.gguf"),
        "merged_because": ["it has a bias"],
    }


def test_an_adapter_of_the_same_size_is_replaced_where_its_digest_is_another(
    place: Place, run: Path, tmp_path: Path
) -> None:
    stage = ExportStage(place.ship)
    stage.publish(artifact(tmp_path / "a", "1st", GGUF_FILE, ADAPTER_FILE, **EXPORT_FACTS), run, None)
    stage.publish(artifact(tmp_path / "b", "2nd", GGUF_FILE, ADAPTER_FILE, **EXPORT_FACTS), run, "1st")
    shipped = {"mini-q8_0.gguf": f"2nd {GGUF_FILE}", "mini-q8_0-adapter.gguf": f"2nd {ADAPTER_FILE}"}
    assert files(run) == {**shipped, "Modelfile": "earlier"}
    stage.publish(artifact(tmp_path / "c", "3rd", GGUF_FILE, **EXPORT_FACTS), run, "2nd")
    assert files(run) == {"mini-q8_0.gguf": f"3rd {GGUF_FILE}", "Modelfile": "earlier"}


def test_a_model_goes_before_its_adapter_does(place: Place, run: Path, tmp_path: Path) -> None:
    """What stops in the middle leaves no base without its adapter, nor an adapter on another model."""
    made = artifact(tmp_path / "a", "new", GGUF_FILE, ADAPTER_FILE, **EXPORT_FACTS | {"quant": "f16"})
    in_the_middle = replace(made, outputs={GGUF_FILE: made.outputs[GGUF_FILE]})
    with pytest.raises(KeyError, match=ADAPTER_FILE):
        ExportStage(place.ship).publish(in_the_middle, run, None)
    assert [path.name for path in run.glob("*.gguf")] == ["mini-f16-adapter.gguf"]


def test_a_modelfile_that_is_not_written_any_more_goes(place: Place, run: Path, tmp_path: Path) -> None:
    stage = ModelfileStage(place.ship)
    stage.publish(artifact(tmp_path / "a", "new", "Modelfile", "Modelfile.jinja"), run, None)
    assert (files(run)["Modelfile"], files(run)["Modelfile.jinja"]) == (
        "new Modelfile",
        "new Modelfile.jinja",
    )
    stage.publish(artifact(tmp_path / "b", "newer", "Modelfile.jinja"), run, None)
    assert files(run)["Modelfile.jinja"] == "newer Modelfile.jinja" and "Modelfile" not in files(run)
    facts = {**MODELFILE_FACTS, "modelfile": None, "reason": "it reverses the turns"}
    summary = stage.summary(Result("modelfile", False, 0.0, facts), run)
    assert summary == {"modelfile": None, "modelfile_reason": "it reverses the turns"}


def test_a_merged_checkpoint_leaves_no_model_of_an_earlier_recipe(run: Path, tmp_path: Path) -> None:
    name = f"{MERGED_DIRECTORY}/config.json"
    stage = MergeStage(place_of(tmp_path, RECIPE + "export: none\n").ship)
    stage.publish(artifact(tmp_path / "a", "new", name), run, None)
    assert not list(run.glob("*.gguf")) and files(run)[name] == f"new {name}"
    assert stage.summary(Result("merge", False, 0.0, {}), run) == {"merged": str(run / MERGED_DIRECTORY)}


def test_the_matrix_and_the_adapter(run: Path, tmp_path: Path) -> None:
    ship = place_of(tmp_path, RECIPE + IMATRIX).ship
    CalibrateStage(ship).publish(artifact(tmp_path / "a", "new", IMPORTANCE_FILE), run, None)
    TrainStage(ship).publish(artifact(tmp_path / "b", "new", "adapter_config.json", "README.md"), run, None)
    found = files(run)
    assert found[f"calibration/{IMPORTANCE_FILE}"] == f"new {IMPORTANCE_FILE}"
    assert found["adapter/adapter_config.json"] == "new adapter_config.json"
    assert found["adapter/README.md"] == "new README.md"


def test_an_adapter_of_another_tool_is_taken_in_with_its_tokenizer(tmp_path: Path) -> None:
    theirs = write_adapter(tmp_path / "theirs")
    (theirs / "chat_template.jinja").write_text(CHATML)
    place = place_of(tmp_path, f"name: mini\nbase: ./base\ndata: {SAMPLE}\ntrain: {{from: ./theirs}}\n")
    stage = AdoptStage(place.ship)
    facts = stage.build({}, place.out)
    assert facts == AdoptedFacts("./theirs", None, read_adapter(theirs).base_name, 1, names_unwrapped=False)
    assert tree(place.out) == tree(theirs)
    assert place.ship.adopted is not None
    adopted = replace(place.ship.adopted, spec="someone/theirs", directory=None)
    away = replace(place.ship, adopted=adopted)
    with pytest.raises(DataError, match="someone/theirs is not here") as absent:
        AdoptStage(away).build({}, place.out)
    assert absent.value.hint == "run without --offline"


def test_a_modelfile_of_a_gguf_with_another_template_is_refused(tmp_path: Path) -> None:
    """A fact of the stage says of how many conversations it is proved, and the proof counts them."""
    ship = ship_of(tmp_path, "runtime: none")
    stage, templates = ModelfileStage(ship), {"right": ship.template.pinned_source(), "wrong": CHATML + "!"}
    exported = {}
    for name, template in templates.items():
        (tmp_path / name).mkdir()
        write_tiny_gguf(tmp_path / name / GGUF_FILE, template=template)
        exported[name] = {"export": Artifact("export", "k", "d", tmp_path / name, EXPORT_FACTS)}
    (tmp_path / "out").mkdir()
    facts = stage.build(exported["right"], tmp_path / "out")
    assert facts.same_prompts.conversations == 200
    with pytest.raises(CheckError, match="prompt"):
        stage.build(exported["wrong"], tmp_path / "out")


@pytest.mark.parametrize("is_here", [True, False], ids=["with the base", "without the base"])
def test_a_plan_refuses_the_rows_that_a_ship_would(is_here: bool, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say 1.", "completion": "1."}\n{"prompt": "Say 2."}\n')
    place = place_of(tmp_path, "name: mini\nbase: ./base\ndata: {source: rows.jsonl, columns: {}}\n")
    ship = place.ship if is_here else replace(place.ship, base=replace(place.ship.base, directory=None))
    with pytest.raises(DataError):
        DataStage(ship).look()


def test_a_row_of_which_the_last_turn_is_learned_ends_there_only(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    recipe = "name: mini\nbase: ./base\ndata: {source: rows.jsonl}\ntrain: {supervise: last}\n"
    place = place_of(tmp_path, recipe)
    DataStage(place.ship).build({}, place.out)
    [row] = (place.out / TRAIN_FILE).read_text(encoding="utf-8").splitlines()
    assert sum(label >= 0 for label in json.loads(row)["labels"]) < len(json.loads(row)["labels"]) / 2


def test_a_merged_checkpoint_that_is_kept_takes_its_room(tmp_path: Path) -> None:
    def kept(lines: str) -> int:
        return sum(ExportStage(place_of(tmp_path, RECIPE + lines).ship).bytes_kept().values())

    assert kept("export: {keep_merged: true}\n") > 2 * kept("")
    whole = place_of(tmp_path, RECIPE.replace("qlora", "full")).ship
    assert TrainStage(whole).bytes_kept() == {"adapter": 4 * whole.parameters}
    # Two checkpoints, each with weights and Adam's two moments.
    assert TrainStage(whole).bytes_beside() == {"checkpoints": 2 * 3 * 4 * whole.parameters}


def test_the_data_stage_says_how_long_training_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listen(monkeypatch)
    DataStage(place.ship).build({}, place.out)
    assert "training: 15 steps of 4 rows" in said.lines
    assert {TRAIN_FILE, HELDOUT_FILE} <= tree(place.out).keys()


def test_the_sections_of_the_report_begin_with_what_a_reader_asks_first(tmp_path: Path) -> None:
    stages = stages_for(place_of(tmp_path, RECIPE + IMATRIX).ship)
    assert [stage.name for stage in sorted(stages, key=lambda stage: stage.rank)] == [
        "verify", "evaluate", "train", "data", "validate", "calibrate", "export", "deploy", "modelfile",
        "smoke",
    ]  # fmt: skip


def test_what_each_stage_needs(tmp_path: Path) -> None:
    def needs(recipe: str) -> dict[str, tuple[str, ...]]:
        return {stage.name: stage.needs for stage in stages_for(place_of(tmp_path, recipe).ship)}

    assert needs(RECIPE + IMATRIX) == {
        "data": (), "train": ("data",), "validate": ("train",), "evaluate": ("data", "train"),
        "calibrate": ("data", "train"), "export": ("data", "train", "calibrate"),
        "modelfile": ("data", "export"), "verify": ("data", "train", "calibrate", "export"),
        "deploy": ("export",), "smoke": ("deploy",),
    }  # fmt: skip
    assert needs("name: mini\nbase: ./base\ntrain: none\n") == {
        "export": (), "modelfile": ("export",), "verify": ("export",), "deploy": ("export",),
        "smoke": ("deploy",),
    }  # fmt: skip
    assert list(needs(RECIPE + "export: none\n")) == ["data", "train", "validate", "evaluate", "merge"]
