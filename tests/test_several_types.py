"""`export.quant: [q4_k_m, q8_0]`: one training, a file and a certificate of each type, the first served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge.export.run import ADAPTER_FILE, GGUF_FILE
from forge.pipeline.stage import Result, Stage, select
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.runs.find import find_model
from forge.stages import stages_for, verify
from forge.store.artifacts import Artifact, Store
from forge.store.publication import Output
from tests.test_stages_asking import EXPORT_FACTS, MODELFILE_FACTS
from tests.test_verify_maths import _measurement as measurement

RECIPE = (
    "name: mini\nbase: builtin:tiny\n"
    "data: {source: builtin:yoda, columns: {prompt: sentence, completion: translation_extra}, eval: 4}\n"
)
TWO = "export.quant=[q4_k_m, Q8_0]"


def _stages(place: Path, *overrides: str) -> Mapping[str, Any]:
    (place / "recipe.yaml").write_text(RECIPE)
    loaded = load(place / "recipe.yaml", overrides)
    ship = resolve_recipe(loaded, Store(place / "home"), place / "runs" / "mini", offline=True)
    return {stage.name: stage for stage in stages_for(ship)}


def test_each_type_is_the_artifact_that_it_would_be_alone(tmp_path: Path) -> None:
    """So that a type that is added, or named first, makes nothing again."""
    both = _stages(tmp_path, TWO)
    assert list(both)[4:] == [
        "export", "export-q8_0", "modelfile", "modelfile-q8_0", "verify", "verify-q8_0", "deploy", "smoke",
    ]  # fmt: skip
    for quant, suffix in (("q4_k_m", ""), ("q8_0", "-q8_0")):
        alone = _stages(tmp_path, f"export.quant={quant}")
        for kind in ("export", "modelfile", "verify"):
            mine = both[kind + suffix]
            assert (mine.kind, mine.params()) == (kind, alone[kind].params())
    assert both["verify-q8_0"].needs[-1] == both["modelfile-q8_0"].needs[-1] == "export-q8_0"
    kept = _stages(tmp_path, TWO, "export.keep_merged=true")
    params = [kept[name].params()["export.keep_merged"] for name in ("export", "export-q8_0")]
    assert params == [True, False]  # the same weights once


def test_stages_of_a_kind_go_together(tmp_path: Path) -> None:
    steps = tuple(_stages(tmp_path, TWO).values())
    chosen = select(steps, from_stage="export", until="export")
    assert [stage.name for stage in chosen.stages][-1] == "export-q8_0"
    assert list(chosen.forced) == ["export", "export-q8_0"]
    assert list(select(steps, from_stage="verify-q8_0").forced) == ["verify-q8_0", "deploy", "smoke"]


def _made(place: Path, stage: Stage, *names: str, digest: str = "d", **facts: Any) -> Artifact:
    """An artifact with files that say of what and when they are."""
    path = place / "store" / f"{stage.name}-{digest}"
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_text(f"{stage.name} {digest}")
    outputs = {name: Output("", (path / name).stat().st_size) for name in names}
    return Artifact(stage.kind, "key", digest, path, facts, outputs=outputs)


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_a_run_holds_the_files_of_its_last_recipe_only(tmp_path: Path, mode: str) -> None:
    run = tmp_path / "runs" / "mini"
    run.mkdir(parents=True)
    adapter = (ADAPTER_FILE,) if mode == "adapter" else ()

    def publish(stages: Mapping[str, Any], digest: str, before: str | None, *names: str) -> set[str]:
        for name in names:
            quant = stages[name].ship.further_type or "q4_k_m"
            artifact = _made(
                tmp_path, stages[name], GGUF_FILE, *adapter, digest=digest, **EXPORT_FACTS | {"quant": quant}
            )
            stages[name].publish(artifact, run, before)
        return {path.name for path in run.glob("*.gguf") if not path.name.endswith("-adapter.gguf")}

    both = _stages(tmp_path, TWO, f"export.mode={mode}")
    two = {"mini-q4_k_m.gguf", "mini-q8_0.gguf"}
    assert publish(both, "1", None, "export", "export-q8_0") == two
    assert publish(both, "1", "1", "export", "export-q8_0") == two
    assert len([*run.glob("*-adapter.gguf")]) == 2 * len(adapter)
    # Trained anew and stopped between the two: what is left of the second is of the training before.
    assert publish(both, "2", "1", "export") == {"mini-q4_k_m.gguf"}
    assert publish(both, "2", "1", "export-q8_0") == two
    assert (run / "mini-q8_0.gguf").read_text() == "export-q8_0 2"
    alone = _stages(tmp_path, f"export.mode={mode}")
    assert publish(alone, "2", "2", "export") == {"mini-q4_k_m.gguf"}
    assert len([*run.glob("*-adapter.gguf")]) == len(adapter)


def test_each_type_has_its_modelfiles(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mini"
    run.mkdir(parents=True)
    (run / "Modelfile-mine").write_text("kept")
    for stages, expected in (
        (_stages(tmp_path, TWO), {"Modelfile", "Modelfile.jinja", "Modelfile-q8_0", "Modelfile-q8_0.jinja"}),
        (_stages(tmp_path), {"Modelfile", "Modelfile.jinja"}),
    ):
        for name in (one for one in stages if one.startswith("modelfile")):
            artifact = _made(tmp_path, stages[name], "Modelfile", "Modelfile.jinja")
            stages[name].publish(artifact, run, None)
            assert stages[name].summary(Result(name, False, 0, MODELFILE_FACTS), run).get("modelfile") == (
                str(run / "Modelfile") if name == "modelfile" else None
            )
        assert {path.name for path in run.iterdir()} == {*expected, "Modelfile-mine"}


def test_the_manifest_lists_all_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = _stages(tmp_path, TWO)

    def result(name: str, **facts: Any) -> Result:
        return Result(name, False, 0, facts, _made(tmp_path, stages[name], **facts))

    made = (
        result("export", **EXPORT_FACTS | {"quant": "q4_k_m", "bytes": 1}),
        result("export-q8_0", **EXPORT_FACTS | {"quant": "q8_0", "bytes": 2}),
        result("modelfile", **MODELFILE_FACTS),
        result("modelfile-q8_0", **MODELFILE_FACTS | {"modelfile": None}),
        result("verify", **measurement()),
    )
    results = {one.name: one for one in made}
    verdict = {"ok": True, "verdict": "is base and adapter", "logits": {"kl_mean": 0.1}}
    judged = SimpleNamespace(plain=lambda: verdict)
    monkeypatch.setattr(verify, "certificate", lambda ship, measured, live=None: judged)
    fields = stages["verify"].findings(results)
    assert fields["certificate"] == verdict
    assert fields["types"] == [
        {
            "quant": "q4_k_m", "gguf": "mini-q4_k_m.gguf", "bytes": 1, "modelfile": "Modelfile",
            "modelfile_jinja": "Modelfile.jinja", "certificate": "certificate.json", "ok": True,
            "verdict": "is base and adapter", "logits": {"kl_mean": 0.1},
        },
        {
            "quant": "q8_0", "gguf": "mini-q8_0.gguf", "bytes": 2, "modelfile": None,
            "modelfile_jinja": "Modelfile-q8_0.jinja", "certificate": None, "ok": None, "verdict": None,
            "logits": None,
        },
    ]  # fmt: skip
    # What is one type's own field stays the first's.
    run = tmp_path / "runs" / "mini"
    assert stages["export-q8_0"].summary(results["export-q8_0"], run) == {}
    assert stages["verify-q8_0"].findings(results) == {}


def test_a_run_is_served_in_the_type_that_is_named_first(tmp_path: Path) -> None:
    run = tmp_path / "mini"
    run.mkdir()
    (run / "manifest.json").write_text('{"name": "mini", "facts": {"export": {"quant": "q8_0"}}}')
    for name in ("mini-q4_k_m.gguf", "mini-q8_0.gguf"):
        (run / name).touch()
    assert find_model(str(run)) == (run / "mini-q8_0.gguf", None)
    (run / "mini-q8_0.gguf").unlink()
    assert find_model(str(run)) == (run / "mini-q4_k_m.gguf", None)
