"""A ship with a budget instead of a type, and with an importance matrix; `forge export` with the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.export.importance import weights_in
from forge.model.gguf_header import read_gguf
from forge.recipe.quants import BUDGETED
from tests.shipping import Answer, Workshop

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500)]

PLAIN: dict[str, Any] = {"train": "none", "deploy": {"runtime": "none"}, "smoke": None}


def figures(answer: Answer) -> dict[str, float]:
    return {one["quant"]: one["kl_mean"] for one in answer.fields["calibration"]["types"]}


@pytest.mark.slow
def test_a_budget_chooses_the_smallest_type_within_it(workshop: Workshop) -> None:
    """The table is in the result, the log, the manifest and the report; a looser budget, a smaller type."""
    workshop.recipe(**PLAIN, export={"quant": {"max_kl": 0.02}})
    made = workshop.ship()
    assert list(made.cached) == ["data", "calibrate", "export", "modelfile", "verify"]
    table, chosen = figures(made), made.fields["calibration"]["quant"]
    names = list(table)
    assert names[0] == "q8_0" and table[chosen] <= 0.02
    sizes = {one["quant"]: one["bytes"] for one in made.fields["calibration"]["types"]}
    assert all(sizes[name] >= sizes[chosen] for name in names if table[name] <= 0.02)
    assert {*names, *made.fields["calibration"]["left_out"]} == {*BUDGETED}
    gguf = Path(made.fields["gguf"])
    assert gguf == workshop.run / f"mini-{chosen}.gguf" and gguf.is_file()
    assert made.fields["certificate"]["ok"] and made.fields["certificate"]["file"]["type"] == chosen
    assert f"FROM ./mini-{chosen}.gguf" in (workshop.run / "Modelfile").read_text(encoding="utf-8")
    log = (workshop.run / "log.txt").read_text(encoding="utf-8")
    assert all(f"{name}: " in log for name in table)
    assert workshop.manifest()["facts"]["calibrate"] == made.fields["calibration"]
    page = (workshop.run / "report.html").read_text(encoding="utf-8")
    assert f"<strong>{chosen}</strong> is the smallest type within" in page
    assert page.count("<circle") == len(table) and "budget 0.02</text>" in page
    again = workshop.ship()
    assert all(again.cached.values())
    assert figures(again) == table

    loose = max(table.values()) * 1.01
    looser = workshop.ship("-o", f"export.quant={{max_kl: {loose}}}")
    assert not looser.cached["calibrate"]
    smaller = Path(looser.fields["gguf"])
    assert smaller.stat().st_size < made.fields["certificate"]["file"]["bytes"]
    assert [path.name for path in workshop.run.glob("*.gguf")] == [smaller.name] != [gguf.name]


def test_a_budget_that_nothing_meets_stops_the_ship_with_the_table(workshop: Workshop) -> None:
    workshop.recipe(**PLAIN, export={"quant": {"max_kl": 1e-9}})
    failed = workshop.ship(code=5)
    assert failed.fields["error"]["message"].startswith("no type is within a KL of 1e-09: the best of them")
    assert list(figures(failed)) == ["q8_0", "q6_k"]
    left_out = failed.fields["calibration"]["left_out"]
    assert {*left_out} == {*BUDGETED} - {"q8_0", "q6_k"}
    assert {*left_out.values()} == {"two larger types of its kind are over the budget"}
    assert "left out: q5_k_m, q5_k_s" in failed.said
    assert not list(workshop.run.glob("*.gguf"))
    page = (workshop.run / "report.html").read_text(encoding="utf-8")
    assert "No type is within" in page and page.count("<circle") == 2
    assert "q2_k was left out: two larger types" in page
    assert "export.quant.max_kl" in failed.fields["error"]["hint"]


@pytest.mark.slow
def test_a_type_that_needs_an_importance_matrix_ships_with_one(workshop: Workshop) -> None:
    """The matrix is made once: another type takes it, and a plain one none of it."""
    workshop.recipe(**PLAIN, export={"quant": "iq3_xxs", "imatrix": True})
    made = workshop.ship()
    assert made.cached["calibrate"] is False and "types" not in made.fields["calibration"]
    assert "IQ3_XXS" in read_gguf(Path(made.fields["gguf"])).tensor_types
    assert "beyond_vendor" in made.fields["certificate"]["handovers"][-1]
    assert weights_in(workshop.run / "calibration" / "importance.gguf"), "what forge verify asks for"
    other = workshop.ship("-o", "export.quant=q4_k_m")
    assert other.cached["calibrate"] and not other.cached["export"]
    plain = workshop.ship("-o", "export.quant=q4_k_m", "-o", "export.imatrix=false")
    assert "calibrate" not in plain.cached and "calibration" not in plain.fields
    assert not (workshop.run / "calibration").exists()
    weighed, even = (answer.fields["certificate"]["logits"]["kl_mean"] for answer in (other, plain))
    assert weighed < even


@pytest.mark.slow
@pytest.mark.campaign
def test_files_alone_take_a_budget_and_rows(workshop: Workshop) -> None:
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workshop.directory / "rows.jsonl").write_text(text, encoding="utf-8")
    given = ("export", "--base", "builtin:tiny", "--out", "small.gguf", "--data", "rows.jsonl")
    made = workshop.forge(*given, "--max-kl", "0.05")
    assert made.code == 0, made.said
    calibration = made.fields["calibration"]
    assert made.fields["quant"] == calibration["quant"] and calibration["importance"]["rows"] == 36
    assert calibration["measured_on"]["rows"] == 4
    assert calibration["warnings"] == []
    left = {path.name for path in workshop.directory.iterdir()}
    assert left == {"errors.txt", "rows.jsonl", "small.gguf", "small-imatrix.gguf"}
    assert made.fields["imatrix"] == str(workshop.directory / "small-imatrix.gguf")
    none = workshop.forge(*given, "--max-kl", "1e-9")
    assert none.code == 5 and len(none.fields["calibration"]["types"]) == 2


@pytest.mark.slow
@pytest.mark.campaign
def test_a_file_that_needs_its_matrix_is_verified_with_it(workshop: Workshop) -> None:
    """What forge exports it can certify, from what lies there; without the matrix it says what is missing."""
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workshop.directory / "rows.jsonl").write_text(text, encoding="utf-8")
    given = ("--base", "builtin:tiny", "--data", "rows.jsonl")
    made = workshop.forge("export", *given, "--quant", "iq3_xxs", "--out", "small.gguf")
    assert made.code == 0, made.said
    good = workshop.forge("verify", *given, "--gguf", "small.gguf", "--imatrix", made.fields["imatrix"])
    assert good.code == 0, good.said
    assert good.fields["handovers"][-1]["to"] == "GGUF iq3_xxs"
    assert good.fields["handovers"][-1]["beyond_vendor"] == pytest.approx(1, abs=0.05)
    without = workshop.forge("verify", *given, "--gguf", "small.gguf")
    assert without.code == 2 and "--imatrix" in without.fields["error"]["hint"]
    assert any(
        "it failed at: the file's header" in one["message"] for one in without.fields["error"]["problems"]
    )
    other = workshop.forge("verify", *given, "--gguf", "small.gguf", "--imatrix", "small.gguf")
    assert other.code == 2 and "is no importance matrix" in other.fields["error"]["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-kl", "0.1"), "--max-kl needs rows to measure on"),
        (("--max-kl", "0.1", "--quant", "q8_0", "--data", "x"), "--max-kl chooses the type, and --quant"),
        (("--quant", "IQ2_M"), "IQ2_M needs an importance matrix"),
        (("--max-kl", "nan", "--data", "x"), "--max-kl': nan is not finite"),
        (("--max-kl", "inf", "--data", "x"), "--max-kl': inf is not finite"),
        (("--quant", "F16", "--data", "x"), "F16 is not rounded by importance"),
        (("--data", "x.jsonl", "--plain"), "--data looks at one merged model"),
        (("--data", "x.jsonl"), "x.jsonl"),
    ],
)
def test_options_that_do_not_go_together(workshop: Workshop, options: tuple[str, ...], message: str) -> None:
    told = workshop.forge("export", "--base", "builtin:tiny", "--out", "small.gguf", *options)
    assert told.code == 2 and message in told.fields["error"]["message"], told.said
    assert not (workshop.directory / "small.gguf").exists()
