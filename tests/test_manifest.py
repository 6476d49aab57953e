"""A run's manifest: what is read of it, of older runs too, and what stays in its JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from forge import report
from forge.cli.main import run_command
from forge.data.account import Prepared
from forge.runs.manifest import Learned, Manifest, Pins, RunView, manifest_of, read_manifest
from forge.stages.deploy import DeployFacts
from forge.stages.export import ExportFacts
from forge.stages.modelfile import ModelfileFacts
from forge.stages.smoke import SmokeFacts
from forge.train.evaluate import Evaluated
from forge.train.request import Trained
from tests.finished_runs import write_run

OLD: dict[str, Any] = {
    "format": 1,
    "name": "yoda",
    "outcome": "shipped",
    "base": {"spec": "org/base", "revision": "abc"},
    "artifacts": {
        "export": {"key": "k", "digest": "d", "files": {"model.gguf": {"sha256": "s", "bytes": 3}}}
    },
    "facts": {"data": {"max_length": 64, "rows": 8}, "words": {"words": 7}},
    "learned": {"metric": "exact_match", "before": 0, "after": 0.5, "rows": 2},
    "words_found": ["a"],
}


def written(directory: Path, content: object) -> Path:
    (directory / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def test_a_run_of_an_older_version_is_read_with_defaults(tmp_path: Path) -> None:
    manifest = read_manifest(written(tmp_path, OLD))
    assert (manifest.name, manifest.base.spec, manifest.base.licence) == ("yoda", "org/base", None)
    assert manifest.pins == Pins() and manifest.certificate is None and manifest.verdict is None
    assert manifest.learned == Learned("exact_match", 0.0, 0.5, 2)
    assert manifest.artifacts["export"].files["model.gguf"].bytes == 3
    facts = manifest.read_facts()
    assert (facts.data.max_length, facts.export.mode, facts.smoke.smoke) == (64, "merged", ())


def test_what_is_not_known_stays_in_the_json(tmp_path: Path) -> None:
    plain = read_manifest(written(tmp_path, OLD)).as_json()
    assert plain["words_found"] == ["a"] and plain["facts"] == OLD["facts"]
    assert "others" not in plain
    assert manifest_of(plain).as_json() == plain


def test_a_later_stages_findings_stand_over_an_earlier_ones() -> None:
    first = Manifest(name="a").with_findings({"learned": Learned("exact_match", 0.0, 0.5, 2), "seen": 1})
    later = first.with_findings({"learned": Learned("exact_match", 0.0, 1.0, 2, served=True)})
    assert later.learned and later.learned.after == 1.0 and later.others == {"seen": 1}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"name": 3}', '{"name": "a", "facts": {"data": {"max_length": "x"}}}']
)
def test_one_that_is_none_is_no_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    assert read_manifest(tmp_path) == Manifest()
    assert read_manifest(tmp_path / "nowhere") == Manifest()


def test_one_of_another_shape_is_reported_by_its_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_manifest(written(tmp_path, {"name": "a", "pins": {"base_revision": 3}}))
    report.close()
    assert "Manifest.pins.base_revision" in capsys.readouterr().err


FACTS = {
    "data": Prepared, "train": Trained, "evaluate": Evaluated, "export": ExportFacts,
    "modelfile": ModelfileFacts, "deploy": DeployFacts, "smoke": SmokeFacts,
}  # fmt: skip


def test_what_is_read_of_a_stage_is_what_the_stage_says() -> None:
    """A fact that is renamed in its stage would be read as one that an older run lacks."""
    view = RunView()
    read = {stage.name: {field.name for field in fields(getattr(view, stage.name))} for stage in fields(view)}
    said = {stage: {field.name for field in fields(kind)} for stage, kind in FACTS.items()}
    assert read.keys() == said.keys()
    assert {stage: names - said[stage] for stage, names in read.items() if names - said[stage]} == {}


def test_a_bill_of_materials_has_base_packages_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CycloneDX 1.6: each kind of component once, the same bytes when it is written again."""
    monkeypatch.chdir(tmp_path)
    made = {
        "key": "k", "digest": "d", "recorded": {"torch": "2.13.0"}, "tools": {"llama.cpp converters": "b1"},
        "files": {"model.gguf": {"sha256": "a" * 64, "bytes": 3}},
    }  # fmt: skip
    base = {"spec": "org/tiny", "revision": "c" * 40, "licence": "apache-2.0", "digest": "d1"}
    trained = {**made, "recorded": {"torch": "2.12.0", "bitsandbytes": "not installed"}, "files": {}}
    write_run("yoda", base=base, data={"digest": "d2"}, artifacts={"train": trained, "export": made})
    for name in ("one.json", "two.json"):
        assert run_command(["show", "yoda", "--bom", name]) == 0
    text = Path("one.json").read_text(encoding="utf-8")
    assert Path("two.json").read_text(encoding="utf-8") == text
    bom = json.loads(text)
    assert (bom["bomFormat"], bom["specVersion"], bom["metadata"]["component"]["name"]) == (
        "CycloneDX", "1.6", "yoda",
    )  # fmt: skip
    by_name = {part["name"]: part for part in bom["components"]}
    assert by_name["org/tiny"]["licenses"] == [{"license": {"name": "apache-2.0"}}]
    torch = [part["purl"] for part in bom["components"] if part["name"] == "torch"]
    assert torch == ["pkg:pypi/torch@2.12.0", "pkg:pypi/torch@2.13.0"] and "bitsandbytes" not in by_name
    assert by_name["llama.cpp"]["type"] == "application" and by_name["training rows"]["type"] == "data"
    assert by_name["export/model.gguf"]["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert {"type": "top1", "value": "0.97"} in bom["metadata"]["component"]["modelCard"][
        "quantitativeAnalysis"
    ]["performanceMetrics"]
