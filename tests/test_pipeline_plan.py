"""The plan: what would run and why, in words; nothing written. Style rows 5, 6 and 7."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.pipeline.plan import Plan, plan_stages
from forge.pipeline.reasons import changes, other_versions, short
from forge.pipeline.run import run_stages
from forge.store.artifacts import Store
from forge.store.runs import requests
from tests.test_pipeline_stages import Pipeline

ALWAYS = (False, ("looks at the world: always runs",))


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(tmp_path / "journal")


@pytest.fixture
def shipped(tmp_path: Path, pipeline: Pipeline) -> Store:
    """A store after one ship of the run `runs/yoda`."""
    store = Store(tmp_path / "store")
    directory = tmp_path / "runs" / "yoda"
    directory.mkdir(parents=True)
    run_stages(pipeline.stages(), store, run_directory=directory)
    pipeline.built()
    return store


def told(found: Plan) -> dict[str, tuple[bool, tuple[str, ...]]]:
    return {stage.name: (stage.cached, stage.reasons) for stage in found.stages}


def after(store: Store, pipeline: Pipeline, tmp_path: Path, **changed: object) -> dict[str, object]:
    """The plan of the same run with a changed recipe: stage -> reasons, "cached" for a cached one."""
    previous = requests(store, tmp_path / "runs" / "yoda")
    found = plan_stages(pipeline.stages(**changed), store, previous)
    return {
        stage.name: ("cached", *stage.reasons) if stage.cached else stage.reasons
        for stage in found.stages
        if stage.name not in ("deploy", "smoke")
    }


def test_an_empty_store_is_planned_without_writing(tmp_path: Path, pipeline: Pipeline) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = plan_stages(pipeline.stages(), Store(tmp_path / "store", read_only=True), {})
    assert told(found) == {
        "train": (False, ("first time",)),
        "export": (False, ("first time", "waits for train")),
        "verify": (False, ("first time", "waits for train", "waits for export")),
        "deploy": ALWAYS,
        "smoke": ALWAYS,
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_a_changed_comment_runs_nothing(shipped: Store, pipeline: Pipeline, tmp_path: Path) -> None:
    found = after(shipped, pipeline, tmp_path, train_comment="# a remark")
    assert found == {"train": ("cached",), "export": ("cached",), "verify": ("cached",)}


def test_a_changed_gate_runs_nothing(shipped: Store, pipeline: Pipeline, tmp_path: Path) -> None:
    assert after(shipped, pipeline, tmp_path, verify_least_letters=9)["verify"] == ("cached",)


def test_a_changed_field_is_named_with_both_values(
    shipped: Store, pipeline: Pipeline, tmp_path: Path
) -> None:
    assert after(shipped, pipeline, tmp_path, train_learning_rate=3e-4) == {
        "train": ("`train.learning_rate`: 2e-4 → 3e-4",),
        "export": ("waits for train",),
        "verify": ("waits for train", "waits for export"),
    }


def test_every_changed_field_is_named(shipped: Store, pipeline: Pipeline, tmp_path: Path) -> None:
    found = after(shipped, pipeline, tmp_path, train_learning_rate=1.0, train_text="luke", train_version=2)
    assert found["train"] == (
        "stage version 1 → 2",
        "`train.learning_rate`: 2e-4 → 1.0",
        "`data.source`: yoda → luke",
    )


def test_an_upgraded_tool_runs_the_export_again(shipped: Store, pipeline: Pipeline, tmp_path: Path) -> None:
    assert after(shipped, pipeline, tmp_path, export_llama="0.3.36") == {
        "train": ("cached",),
        "export": ("llama-cpp-python: 0.3.35 → 0.3.36",),
        "verify": ("waits for export",),
    }


def test_an_upgraded_training_package_is_said_and_changes_nothing(
    shipped: Store, pipeline: Pipeline, tmp_path: Path
) -> None:
    found = after(shipped, pipeline, tmp_path, train_torch="2.13.0")
    assert found == {
        "train": ("cached", "made with torch 2.12.0 (now 2.13.0)"),
        "export": ("cached",),
        "verify": ("cached",),
    }


def test_an_input_that_changed_is_named(shipped: Store, pipeline: Pipeline, tmp_path: Path) -> None:
    run_stages(pipeline.stages(train_text="luke"), shipped, until="train")  # another run made this adapter
    assert after(shipped, pipeline, tmp_path, train_text="luke") == {
        "train": ("cached",),
        "export": ("input from train changed",),
        "verify": ("input from train changed", "waits for export"),
    }


def test_what_was_collected_is_said(shipped: Store, pipeline: Pipeline, tmp_path: Path) -> None:
    artifact = run_stages(pipeline.stages(), shipped, until="export")["export"].artifact
    assert artifact is not None
    (artifact.path / "artifact.json").unlink()
    assert after(shipped, pipeline, tmp_path)["export"] == ("no longer in the store",)


def test_what_was_stopped_is_said(shipped: Store, pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_stages(pipeline.stages(train_text="luke", train_stops_after=2), shipped)
    found = after(shipped, pipeline, tmp_path, train_text="luke")
    assert found["train"] == ("`data.source`: yoda → luke", "goes on from where it was stopped")


def test_forced_stages_and_until(shipped: Store, pipeline: Pipeline, tmp_path: Path) -> None:
    previous = requests(shipped, tmp_path / "runs" / "yoda")
    found = plan_stages(pipeline.stages(), shipped, previous, until="export", force=frozenset({"train"}))
    assert told(found) == {
        "train": (False, ("forced by --retrain",)),
        "export": (False, ("waits for train",)),
    }
    found = plan_stages(pipeline.stages(), shipped, previous, from_stage="export")
    assert told(found) == {
        "train": (True, ()),
        "export": (False, ("forced by --from export",)),
        "verify": (False, ("forced by --from export", "waits for export")),
        "deploy": ALWAYS,
        "smoke": ALWAYS,
    }


def test_changes_of_requests() -> None:
    base = {"version": 1, "params": {}, "tools": {}, "inputs": {}}
    first, second = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    cases: list[tuple[dict[str, object], dict[str, object], list[str]]] = [
        ({"a": 1}, {"a": 1}, []),
        ({"a": (1, 2)}, {"a": [1, 2]}, []),
        ({}, {"a": 1}, ["`a`: not set → 1"]),
        ({"a": None}, {}, ["`a`: null → not set"]),
        ({"a": 1}, {"a": True}, ["`a`: 1 → true"]),
        ({"base": first}, {"base": second}, ["`base`: its content changed"]),
        ({"a": "x" * 60 + "1"}, {"a": "x" * 60 + "2"}, ["`a`: changed"]),
        ({"a": ["q", "v"]}, {"a": "all-linear"}, ['`a`: ["q", "v"] → all-linear']),
    ]
    for before, now, reasons in cases:
        assert changes({**base, "params": now}, {**base, "params": before}) == reasons  # type: ignore[dict-item]
    more = {**base, "inputs": {"train": "1" * 64}, "tools": {"gguf": "1"}}
    assert changes(more, base) == ["gguf: not set → 1", "now made from train"]  # type: ignore[arg-type]
    assert changes(more, None) == ["first time"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2e-4, "2e-4"),
        (0.05, "0.05"),
        (1.5e-5, "1.5e-5"),
        (-1e-10, "-1e-10"),
        (3.0, "3.0"),
        (1e22, "1e22"),
        (0.1 + 0.2, "0.30000000000000004"),
        (0.0, "0.0"),
        (float("nan"), "nan"),
        (12, "12"),
        (True, "true"),
        (None, "null"),
        ("cosine", "cosine"),
        ("", '""'),
        ("a\nb", '"a\\nb"'),
        ("sha256:" + "0123456789abcdef" * 4, "01234567"),
        ({"k": [1]}, '{"k": [1]}'),
        ("y" * 100, "y" * 47 + "…"),
    ],
)
def test_values_are_shown_short(value: object, text: str) -> None:
    assert short(value) == text


def test_other_versions() -> None:
    assert other_versions({"torch": "1", "peft": "2"}, {"peft": "2", "torch": "1"}) == []
    assert other_versions({"torch": "1"}, {"trl": "3", "torch": "2"}) == [
        "made with torch 1 (now 2), trl unknown (now 3)"
    ]
