"""The runner: found or built, early cut-off, forced stages, failures, what is said."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from forge.errors import CheckError, StageError
from forge.pipeline.run import run_stages
from forge.pipeline.stage import Result, Step
from forge.store.artifacts import Store
from forge.store.runs import requests, runs
from tests.test_pipeline_stages import Pipeline, listen

PURE = ["train", "export", "verify"]
ACTIONS = ["deploy", "smoke", "stopped"]


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(tmp_path / "journal")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def files(store: Store) -> list[Path]:
    """All files but the (empty) ones that are locked."""
    return sorted(path for path in store.root.rglob("*") if path.is_file() and path.suffix != ".lock")


def cached(results: dict[str, Result]) -> dict[str, bool]:
    return {name: result.cached for name, result in results.items()}


def test_first_everything_is_built_then_everything_is_cached(store: Store, pipeline: Pipeline) -> None:
    first = run_stages(pipeline.stages(), store)
    assert pipeline.built() == [*PURE, *ACTIONS]
    second = run_stages(pipeline.stages(train_comment="changed"), store)
    assert pipeline.built() == ACTIONS
    assert list(second) == ["train", "export", "verify", "deploy", "smoke"]
    assert cached(second) == {"train": True, "export": True, "verify": True, "deploy": False, "smoke": False}
    assert second["smoke"].facts == {"answer": "YODA 2E-04"}
    for name in PURE:
        assert first[name].artifact == second[name].artifact
        assert first[name].facts == second[name].facts


def test_a_changed_field_runs_its_stage_and_those_behind(store: Store, pipeline: Pipeline) -> None:
    run_stages(pipeline.stages(), store)
    pipeline.built()
    run_stages(pipeline.stages(export_llama="0.3.36"), store, until="verify")
    # The export came out with the same bytes, so the work stops there.
    assert pipeline.built() == ["export"]
    run_stages(pipeline.stages(train_text="luke"), store, until="verify")
    assert pipeline.built() == PURE
    run_stages(pipeline.stages(export_version=2), store, until="verify")
    assert pipeline.built() == ["export"]


def test_training_that_gives_the_same_bytes_stops_there(store: Store, pipeline: Pipeline) -> None:
    run_stages(pipeline.stages(), store)
    pipeline.built()
    results = run_stages(pipeline.stages(train_learning_rate=2.01e-4), store, until="verify")
    assert pipeline.built() == ["train"]
    assert cached(results) == {"train": False, "export": True, "verify": True}


def test_retrain_builds_again_and_stops_at_the_same_bytes(store: Store, pipeline: Pipeline) -> None:
    first = run_stages(pipeline.stages(), store)["train"].artifact
    pipeline.built()
    results = run_stages(
        pipeline.stages(train_torch="2.13.0"), store, until="verify", force=frozenset({"train"})
    )
    again = results["train"].artifact
    assert pipeline.built() == ["train"]
    assert cached(results) == {"train": False, "export": True, "verify": True}
    assert first is not None and again is not None
    assert (again.key, again.digest) == (first.key, first.digest)
    assert (first.recorded, again.recorded) == ({"torch": "2.12.0"}, {"torch": "2.13.0"})


def test_from_and_until(store: Store, pipeline: Pipeline) -> None:
    run_stages(pipeline.stages(), store, until="export")
    assert pipeline.built() == ["train", "export"]
    run_stages(pipeline.stages(), store, from_stage="export")
    assert pipeline.built() == ["export", "verify", *ACTIONS]
    run_stages(pipeline.stages(), store, from_stage="verify", until="verify")
    assert pipeline.built() == ["verify"]


def test_a_stage_that_fails_leaves_the_earlier_ones(store: Store, pipeline: Pipeline) -> None:
    with pytest.raises(StageError, match="no converter"):
        run_stages(pipeline.stages(export_fails=StageError("no converter")), store)
    assert pipeline.built() == ["train", "export"]
    stages = {stage: name for stage, name, _ in store.directories()}
    assert list(stages) == ["train"]  # nothing half-written of the export
    run_stages(pipeline.stages(), store, until="verify")
    assert pipeline.built() == ["export", "verify"]


def test_an_interrupted_stage_goes_on_where_it_was(store: Store, pipeline: Pipeline) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_stages(pipeline.stages(train_stops_after=3), store)
    left = [
        (name.partition(".")[2], sorted(p.name for p in path.rglob("*")))
        for _, name, path in store.directories()
    ]
    assert left == [("partial", ["checkpoint", "work"])]
    results = run_stages(pipeline.stages(), store, until="train")
    assert results["train"].facts == {"resumed": 3, "steps": 4}
    artifact = results["train"].artifact
    assert artifact is not None
    assert sorted(p.relative_to(artifact.path).as_posix() for p in artifact.path.rglob("*")) == [
        "adapter.txt",
        "artifact.json",
        "logs",
        "logs/train.log",
    ]
    assert len(list(store.directories())) == 1


def test_judgement_is_passed_afresh_and_stops_what_is_behind(store: Store, pipeline: Pipeline) -> None:
    run_stages(pipeline.stages(), store)
    pipeline.built()
    heard: list[str] = []
    with pytest.raises(CheckError, match="only 4 letters"):
        run_stages(
            pipeline.stages(verify_least_letters=5), store, on_result=lambda result: heard.append(result.name)
        )
    assert pipeline.built() == []
    assert heard == PURE


def test_what_actions_leave_running_lives_as_long_as_the_callers_stack(
    store: Store, pipeline: Pipeline
) -> None:
    with ExitStack() as stack:
        run_stages(pipeline.stages(), store, stack=stack)
        assert pipeline.built() == [*PURE, "deploy", "smoke"]
    assert pipeline.built() == ["stopped"]


def test_too_small_a_disk_is_said_before_anything_is_written(
    store: Store, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stages(pipeline.stages(), store, until="train")
    pipeline.built()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 3_500_000_000))
    before = files(store)
    with pytest.raises(StageError) as caught:
        run_stages(pipeline.stages(export_bytes_free=28_000_000_000), store)
    assert caught.value.message == f"export needs 28.0 GB of free disk, {store.root} has 3.5 GB"
    assert "FORGE_HOME" in caught.value.hint and caught.value.code == 4
    assert pipeline.built() == []
    assert files(store) == before


def test_a_disk_that_becomes_full_is_an_error_of_the_stage(store: Store, pipeline: Pipeline) -> None:
    with pytest.raises(StageError, match="export: the disk became full"):
        run_stages(pipeline.stages(export_fails=OSError(28, "No space left on device")), store)
    with pytest.raises(OSError, match="elsewhere"):
        run_stages(pipeline.stages(export_fails=OSError(5, "elsewhere")), store)


def test_the_run_is_registered_and_its_requests_remembered(
    store: Store, pipeline: Pipeline, tmp_path: Path
) -> None:
    directory = tmp_path / "runs" / "yoda"
    directory.mkdir(parents=True)
    with pytest.raises(StageError):
        run_stages(pipeline.stages(export_fails=StageError("no")), store, run_directory=directory)
    assert [(found.name, list(found.requests)) for found in runs(store)] == [("yoda", ["train"])]
    run_stages(pipeline.stages(), store, run_directory=directory)
    assert requests(store, directory)["export"]["tools"] == {"llama-cpp-python": "0.3.35"}
    shorter: Sequence[Step] = pipeline.stages()[:2]
    run_stages(shorter, store, run_directory=directory)
    assert list(requests(store, directory)) == ["train", "export"]


def test_what_is_said(
    store: Store, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = listen(monkeypatch)
    run_stages(pipeline.stages(), store, run_directory=tmp_path, until="deploy")
    assert [re.sub(r"\d+\.\d s", "N s", line) for line in said.lines] == [
        "[1/4] train: first time",
        "[1/4] train: N s",
        "[2/4] export: first time",
        "[2/4] export: N s",
        "[3/4] verify: first time",
        "[3/4] verify: N s",
        "[4/4] deploy: starts",
        "[4/4] deploy: N s",
    ]
    said.lines.clear()
    changed = pipeline.stages(train_torch="2.13.0", export_llama="0.3.36")
    run_stages(changed, store, run_directory=tmp_path, until="verify")
    assert [re.sub(r"\d+\.\d s", "N s", line) for line in said.lines] == [
        "[1/3] train: cached (made with torch 2.12.0 (now 2.13.0))",
        "[2/3] export: llama-cpp-python: 0.3.35 → 0.3.36",
        "[2/3] export: N s",
        "[3/3] verify: cached",
    ]
