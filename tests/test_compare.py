"""`forge compare`: two runs side by side, from their manifests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge import report
from forge.cli.main import run_command
from forge.errors import ForgeError
from tests.finished_runs import CERTIFICATE, write_run


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compared(
    capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0
) -> tuple[dict[str, Any], str]:
    """The command's JSON, and what it said."""
    assert run_command(["compare", *arguments, "--json"]) == code
    report.close()
    shown = capsys.readouterr()
    fields: dict[str, Any] = json.loads(shown.out.splitlines()[-1])
    return fields, shown.err


def test_two_runs_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("small", "train.lora.r=8")
    write_run("large", "train.epochs=5")
    fields, said = compared(capsys, "small", "runs/large")
    assert fields["recipe"] == [
        {"field": "train.epochs", "first": 3.0, "second": 5.0},
        {"field": "train.lora.r", "first": 8, "second": 16},
    ]
    assert fields["inputs"] == []
    first, second = (one["figures"] for one in fields["runs"])
    assert (first["trainable_parameters"], second["trainable_parameters"]) == (8000, 16000)
    assert (first["loss_before"], first["gguf_bytes"], first["kl_mean"]) == (3.0, 3_000_000, 0.02)
    assert (first["exact_after"], second["exact_after"]) == (0.0, 1.0), "of what was served"
    assert (first["training_seconds"], first["export_seconds"], first["ship_seconds"]) == (3.5, 1.25, 4.0)
    assert [one["verdict"] for one in fields["certificate"]] == [CERTIFICATE["verdict"]] * 2
    assert [one["after"] for one in fields["learned"]] == [1.0, 1.0]
    assert fields["answers"] == [
        {
            "asked": "smoke", "prompt": "Hello <b>", "expected": None,
            "first": "small: hi", "second": "large: hi",
        },
        {
            "asked": "held out", "prompt": "The sky is blue.", "expected": "Blue, the sky is.",
            "first": "It is.", "second": "Blue, the sky is.",
        },
    ]  # fmt: skip
    assert fields["asked_of_one"] == 0 and fields["page"] is None
    lines = [" ".join(line.split()) for line in said.splitlines()]
    for line in (
        "field small large", "train.lora.r 8 16", "trainable parameters 8,000 16,000",
        "held-out loss 2.2222 1.1765", "file size 3.00 MB 3.00 MB", "KL mean 0.02 0.02",
        "top-1 97.00% 97.00%", "training memory 2.00 GB 2.00 GB", "training time 3.5 s 3.5 s",
        "small → It is.", "large → Blue, the sky is.",
    ):  # fmt: skip
        assert line in lines


def test_the_page_stands_alone_and_escapes_what_models_say(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("small", "train.lora.r=8")
    write_run("large", "smoke=[{prompt: '<script>'}]")
    fields, _ = compared(capsys, "small", "large", "--html", "pages.html")
    page = Path("pages.html").read_text(encoding="utf-8")
    assert fields["page"] == str(Path("pages.html").absolute())
    assert "Hello &lt;b&gt;" in page and "<b>" not in page and "<script" not in page
    assert "http" not in page and "src=" not in page and "href=" not in page
    for text in ("train.lora.r", "large: hi", "1.1765", CERTIFICATE["verdict"], "max-width: 60rem"):
        assert str(text) in page
    _, said = compared(capsys, "small", "large", "--html", "nowhere/pages.html", code=2)
    assert "nowhere/pages.html cannot be written: No such file" in said


def test_a_run_without_certificate_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("whole")
    write_run("half", certificate=None, certificate_reason="the ship did not get as far as verify", facts={})
    fields, said = compared(capsys, "whole", "half")
    assert fields["certificate"][1] is None and fields["runs"][1]["figures"]["kl_mean"] is None
    assert "half: no certificate: the ship did not get as far as verify" in said
    assert "answers: no question was put to both" in said and fields["asked_of_one"] == 2
    assert "no certificate" in compared(capsys, "half", "whole", "--html", "a.html")[1]
    assert "no certificate: the ship did not" in Path("a.html").read_text(encoding="utf-8")


def test_equal_recipes_of_other_files_differ_in_their_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("was")
    write_run("now", base={"spec": "builtin:tiny", "digest": "d2"})
    fields, said = compared(capsys, "was", "now")
    assert fields["recipe"] == []
    assert fields["inputs"] == [{"field": "base (sha256)", "first": "d1", "second": "d2"}]
    assert "base (sha256)  d1   d2" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("known", "nowhere"), "there is no run nowhere"),
        (("known", "known"), "known is named twice"),
        (("known", "./runs/known"), "known and ./runs/known are the same run"),
        (("known", "broken"), "manifest.json cannot be read"),
        (("known", "old"), "the recipe of old is of another version of forge"),
        (("odd", "known"), "the certificate of odd cannot be read"),
        (("known",), "Missing argument"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], forge_home: Path
) -> None:
    write_run("known")
    write_run("old", recipe={"name": "old", "base": {"id": "builtin:tiny"}, "gone": 1})
    write_run("odd", certificate={"verdict": 3})
    (write_run("broken") / "manifest.json").write_text("{")
    fields, said = compared(capsys, *arguments, code=2)
    assert message in fields["error"]["message"] and "Traceback" not in said
    assert fields["error"]["hint"]


def test_only_what_a_run_wrote_down_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store is opened, no model: a run's directory may be all that is left."""
    from forge.commands.compare import compare_runs

    def refuse(*_: object, **__: object) -> None:
        raise ForgeError("the store was opened")

    monkeypatch.setattr("forge.runs.find.open_store", refuse)
    write_run("one")
    write_run("two")
    assert compare_runs("one", "two")["recipe"] == []
