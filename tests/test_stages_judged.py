"""What was measured is judged afresh on every run, by the recipe's limits, and shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge import report
from forge.codec import to_plain
from forge.errors import CheckError
from forge.export.run import GGUF_FILE
from forge.pipeline.stage import Result
from forge.stages.calibrate import CalibrateStage
from forge.stages.deploy import DeployAction, DeployFacts
from forge.stages.evaluate import EvaluateStage
from forge.stages.export import ExportStage
from forge.stages.smoke import SmokeAction, SmokeFacts
from forge.stages.train import TrainStage
from forge.stages.verify import VerifyStage
from forge.store.artifacts import Artifact
from forge.train.figures import Exact, Heldout
from forge.train.log import LOG_FILE
from forge.verify.calibration import MeasuredOn, Search, TypeRow
from tests.models import evaluated
from tests.test_pipeline_stages import Said, listen
from tests.test_stages_asking import CALIBRATED, EXPORT_FACTS, RECIPE, Place, place_of
from tests.test_verify_maths import _leg as leg
from tests.test_verify_maths import _measurement as measurement
from tests.tiny_gguf import write_tiny_gguf

LEARNED: Mapping[str, Any] = to_plain(evaluated(3.0, 1.0, exact=Exact(10, 0, 7, ())))
NOT_LEARNED: Mapping[str, Any] = {**LEARNED, "loss": {"before": 3.0, "after": 3.2}}
DEPLOYED: Mapping[str, Any] = to_plain(DeployFacts("embedded", "http://here", "mini", 512, 2, None))
NOTHING_ASKED = SmokeFacts((), ())
LIVE: Mapping[str, Any] = {
    "handover": {
        "from": "GGUF q4_k_m", "to": "live server", "ok": False, "nmse": None, "kl_mean": 2.0, "kl_max": 3.0,
        "top1": 0.5, "perplexity": None, "prompts": 8, "limit": 0.005,
    },
    "finish_reasons": {}, "problems": ["the server's probabilities are not the file's"],
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_of(tmp_path)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    return listen(monkeypatch)


def of(facts: Mapping[str, Any], path: Path = Path()) -> Artifact:
    return Artifact("stage", "key", "digest", path, facts)


def result(facts: Mapping[str, Any]) -> Result:
    return Result("stage", False, 0.0, facts)


def test_what_was_learned_is_judged_as_the_recipe_says(place: Place, said: Said, tmp_path: Path) -> None:
    assert EvaluateStage(place.ship).judge(of(LEARNED)) is None
    [line] = said.lines
    assert line.startswith(
        "held-out rows (20): loss 3.0000 -> 1.0000 a token, perplexity 20.09 -> 2.718, exact"
    )
    failure = EvaluateStage(place.ship).judge(of(NOT_LEARNED))
    assert isinstance(failure, CheckError) and failure.message.startswith("nothing was learned")
    assert failure.hint.startswith("a lower learning rate or fewer epochs; look at")
    same = {**LEARNED, "loss": {"before": 3.0, "after": 3.0}}
    unmoved = EvaluateStage(place.ship).judge(of(same))
    assert unmoved is not None and unmoved.hint.startswith("train longer or with a higher learning rate; ")
    for word, warned in (("warn", 1), ("off", 0)):
        said.lines.clear()
        lenient = place_of(tmp_path, RECIPE + f"verify: {{learned: {word}}}\n").ship
        assert EvaluateStage(lenient).judge(of(NOT_LEARNED)) is None
        assert len([line for line in said.lines if "nothing was learned" in line]) == warned


def test_what_a_person_should_know_of_a_model_that_learned_is_a_warning(place: Place, said: Said) -> None:
    assert EvaluateStage(place.ship).judge(of({**LEARNED, "falling": "the training loss"})) is None
    assert any("the training loss was still falling" in line for line in said.lines)
    said.lines.clear()
    assert EvaluateStage(place.ship).judge(of({"rows": 0})) is None
    assert [line.partition(":")[0] for line in said.lines] == ["what was learned is not measured"]


def test_what_was_learned_is_the_served_file_s_where_that_was_asked(place: Place) -> None:
    found = EvaluateStage(place.ship).findings({"evaluate": result(LEARNED)})["learned"]
    assert found is not None and (found.before, found.after, found.served) == (0.0, 0.7, False)  # type: ignore[attr-defined]
    asked = {
        "smoke": result(to_plain(replace(NOTHING_ASKED, heldout=Heldout(10, 5, 10, ())))),
        "evaluate": result(LEARNED),
    }
    served = SmokeAction(place.ship).findings(asked)["learned"]
    assert (served.after, served.served, served.rows) == (0.5, True, 10)  # type: ignore[attr-defined]
    assert SmokeAction(place.ship).findings({"smoke": result(to_plain(NOTHING_ASKED))}) == {}


def test_a_budget_that_no_type_meets_is_an_error_with_the_table(place: Place, said: Said) -> None:
    row = TypeRow("q8_0", 1_000_000, 10.0, 1e-3, 1e-4, 0.1, 0.99, 3.0)
    worse = replace(row, quant="q4_k_m", kl_mean=0.2)
    left_out = {"iq2_m": "no matrix", "iq2_s": "no matrix"}
    search = Search(
        1e-5, None, (row, worse), left_out, replace(row, quant="f16"), MeasuredOn(4, 40), ("odd",)
    )
    failure = CalibrateStage(place.ship).judge(of(replace(CALIBRATED, search=search).facts()))
    assert failure is not None and failure.code == 5
    assert failure.message == "no type is within a KL of 1e-05: the best of them, q8_0, has 0.001"
    assert said.lines == ["types, for a KL of at most 1e-05", "left out: iq2_m, iq2_s: no matrix", "odd"]
    chosen = replace(search, quant="q8_0", max_kl=0.01)
    assert CalibrateStage(place.ship).judge(of(replace(CALIBRATED, search=chosen).facts())) is None
    assert CalibrateStage(place.ship).judge(of(CALIBRATED.facts())) is None


def test_the_limits_of_a_certificate_are_the_recipe_s(tmp_path: Path, said: Said) -> None:
    def failure(limits: str, **legs: Any) -> Any:
        said.lines.clear()
        stage = VerifyStage(place_of(tmp_path, RECIPE + f"verify: {{{limits}}}\n").ship)
        return stage.judge(of(measurement(**legs)))

    assert failure("learned: warn") is None
    assert "certificate" in said.lines and said.lines[-1].startswith("verified: ")
    assert "8 of 8 greedy answers are the reference's, token by token" in said.lines
    for limit in ("max_kl: 0.0001", "min_top1: 0.99"):
        broken = failure(limit)
        assert broken.code == 5 and broken.message.startswith("quantize broke it: ")
        assert broken.fields["broken_stage"] == "quantize" and broken.fields["ok"] is False
        assert not any(line.startswith("verified") for line in said.lines)
    shifted = leg(loss_difference=-0.9, loss_error=0.01, kl_mean=1.3, top1=0.6)
    assert failure("as_trained: warn", trained=shifted) is None
    assert failure("as_trained: required", trained=shifted) is not None


def test_the_certificate_has_the_server_s_leg_where_one_was_asked(place: Place) -> None:
    verified = {"verify": result(measurement())}
    alone = VerifyStage(place.ship).findings(verified)
    assert alone["certificate_reason"] is None and alone["certificate"]["ok"] is True  # type: ignore[index]
    action, deployed = DeployAction(place.ship), {"deploy": result({**DEPLOYED, "live": LIVE})}
    assert action.findings(deployed) == {}
    served = action.findings({**verified, **deployed})["certificate"]
    assert served["ok"] is False and served["broken_stage"] == "deploy"  # type: ignore[index]
    failure = action.verdict({**DEPLOYED, "live": LIVE})
    assert failure is not None and failure.code == 5


def test_the_export_says_what_its_type_costs(place: Place, said: Said, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / GGUF_FILE)
    assert ExportStage(place.ship).judge(of({**EXPORT_FACTS, "quant": "f16"}, tmp_path)) is None
    assert len(said.lines) == 1 and "f16" in said.lines[0].lower()


def test_the_page_of_a_training_has_the_losses_of_its_log(place: Place, tmp_path: Path) -> None:
    stage, made = TrainStage(place.ship), of({}, tmp_path)
    assert stage.section_values(result({})) == {"losses": []}
    assert stage.section_values(replace(result({}), artifact=made)) == {"losses": []}
    (tmp_path / "logs").mkdir()
    (tmp_path / LOG_FILE).write_text(
        '{"step": 1, "epoch": 0.5, "loss": 3.5}\n{"step": 2, "epoch": 1, "loss": 2.5}\n'
    )
    assert stage.section_values(replace(result({}), artifact=made)) == {"losses": [(1, 3.5), (2, 2.5)]}


def test_a_file_that_answers_otherwise_more_often_than_not_is_a_warning(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    listen(monkeypatch)
    monkeypatch.setattr(report, "warning", warned.append)
    for same in (3, 4):
        facts = {**measurement(), "greedy": {"prompts": 8, "same": same}}
        assert VerifyStage(place.ship).judge(of(facts)) is None
    assert warned == ["3 of 8 greedy answers are the reference's, token by token"]
