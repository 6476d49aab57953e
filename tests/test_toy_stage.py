"""Adding a stage touches its file, the tuple and its worker task: the rest follows from what it says."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from forge import worker
from forge.codec import Json
from forge.commands.describe import describe_plan
from forge.data.prepare import TRAIN_FILE
from forge.errors import MissingToolError
from forge.pipeline.stage import Result, Step
from forge.resolve.resolved import Resolved
from forge.resolve.stage import ShipStage
from forge.runs.publish import publish_output
from forge.ship.drive import plan, ship
from forge.stages import stages_for
from forge.stages.data import DATA_STAGE
from forge.store.artifacts import Artifact
from tests.worker_tasks import Counted, CountRequest, count_words

ROOT = Path(__file__).parent.parent


class WordsStage(ShipStage):
    """A toy: how many words the training rows have."""

    name = "words"
    version = 1
    needs = (DATA_STAGE,)
    rank = 45
    wanted: tuple[str, ...] = ()

    def params(self) -> Mapping[str, Json]:
        return {}

    def packages(self) -> Collection[str]:
        return self.wanted

    def bytes_kept(self) -> Mapping[str, int]:
        return {"words": 1000}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Counted:
        request = CountRequest(inputs[DATA_STAGE].path / TRAIN_FILE, out)
        return worker.perform(count_words, request, log=self.ship.log)

    def publish(self, artifact: Artifact, run: Path, published: str | None) -> None:
        publish_output(artifact, "words.txt", run / "words.txt", published)

    def summary(self, result: Result, run: Path) -> Mapping[str, object]:
        return {"words": str(run / "words.txt")}

    def section(self) -> str:
        return "<h2>Words</h2><p>{{ facts.words }} words of {{ manifest.name }}</p>"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose pipeline has the toy in it, and workers that know its task."""

    def with_words(resolved: Resolved) -> Sequence[Step]:
        data, *rest = stages_for(resolved)
        return (data, WordsStage(resolved), *rest)

    for module in ("ship.drive", "commands.describe"):
        monkeypatch.setattr(f"forge.{module}.stages_for", with_words)
    monkeypatch.setattr(worker, "TASKS", {**worker.TASKS, "count_words": "tests.worker_tasks:count_words"})
    monkeypatch.setattr(worker, "COMMAND", [sys.executable, "-m", "tests.worker_tasks"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy.yaml"
    columns = "{prompt: sentence, completion: translation}"
    data = f"{{source: builtin:yoda, columns: {columns}, limit: 8, eval: 2}}"
    path.write_text(f"name: toy\nbase: builtin:tiny\ndata: {data}\n")
    return path


@pytest.mark.programs
def test_a_toy_stage_is_planned_run_recorded_published_and_shown(recipe: Path) -> None:
    resolved, planned = plan(recipe)
    described: Mapping[str, Any] = describe_plan(resolved, planned)
    assert [stage["name"] for stage in described["stages"]][:2] == ["data", "words"]
    assert described["disk"]["parts"]["words"] == 1000
    fields: Mapping[str, Any] = ship(recipe, until="words")
    run = Path(fields["run"])
    assert [(stage["name"], stage["cached"]) for stage in fields["stages"]] == [
        ("data", False),
        ("words", False),
    ]
    words = (run / "words.txt").read_text(encoding="utf-8").split()
    assert fields["words"] == str(run / "words.txt") and len(words) > 8
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["facts"]["words"] == {"words": len(words)}
    assert list(manifest["artifacts"]["words"]["files"]) == ["words.txt"]
    assert f"<h2>Words</h2><p>{len(words)} words of toy</p>" in (run / "report.html").read_text("utf-8")
    again: Mapping[str, Any] = ship(recipe, until="words")
    assert all(stage["cached"] for stage in again["stages"])


def test_what_a_toy_stage_lacks_is_said_before_anything_runs(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WordsStage, "wanted", ("no_such_package",))
    with pytest.raises(MissingToolError, match="the Python package no_such_package is not installed"):
        ship(recipe, until="words")
    assert not (tmp_path / "runs").exists()
