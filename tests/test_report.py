"""What a person and a script see of what is said: plain lines, a terminal, JSON."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forge import process, report
from forge.errors import CheckError, DataError, ForgeError, Problem, error_from_json


class Clock:
    """Stands in for `time.monotonic`."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("time.monotonic", made)
    return made


def plain() -> tuple[report.PlainSink, io.StringIO, io.StringIO]:
    stream, errors = io.StringIO(), io.StringIO()
    return report.PlainSink(stream, errors), stream, errors


def test_a_program_that_imports_a_kernel_is_no_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    """nbclient and jupyter_client import ipykernel where nothing shows what a kernel displays."""
    import ipykernel.kernelspec
    import IPython

    assert ipykernel.kernelspec.KERNEL_NAME and IPython.get_ipython() is None
    report.configure()
    for done in (0, 1, 1):
        report.advance("convert", done, 1)
    report.info("there it is")
    assert "there it is" in capsys.readouterr().out


def test_plain_lines_with_faults_apart() -> None:
    sink, stream, errors = plain()
    report.configure(sink=sink)
    report.info("[1/8] data: cached")
    report.detail("not without -v")
    report.warning("low")
    report.success("done")
    report.table("two runs", ("name", "size"), [("a", 1), ("long", None)])
    assert stream.getvalue() == ("[1/8] data: cached\ndone\ntwo runs\n  name  size\n  a     1\n  long\n")
    assert errors.getvalue() == "warning: low\n"


def test_details_are_shown_with_verbose() -> None:
    sink, stream, _ = plain()
    report.configure(sink=sink, verbose=True)
    report.detail("shown")
    assert stream.getvalue() == "shown\n"


def test_plain_progress_is_shown_in_the_first_second_then_every_ten(clock: Clock) -> None:
    sink, stream, _ = plain()
    report.configure(sink=sink)
    report.advance("train", 0, 400, "")
    for step in range(1, 401):
        clock.now += 0.3
        report.advance("train", step, 400, f"loss {1 + 1 / step:.4f}")
    assert stream.getvalue().splitlines() == [
        "train: 0 % loss 1.5000, 1:59 left",
        "train: 9 % loss 1.0278, 1:49 left",
        "train: 18 % loss 1.0143, 1:39 left",
        "train: 26 % loss 1.0096, 1:29 left",
        "train: 34 % loss 1.0072, 1:19 left",
        "train: 43 % loss 1.0058, 1:08 left",
        "train: 52 % loss 1.0049, 0:58 left",
        "train: 60 % loss 1.0042, 0:48 left",
        "train: 68 % loss 1.0036, 0:38 left",
        "train: 77 % loss 1.0032, 0:28 left",
        "train: 86 % loss 1.0029, 0:17 left",
        "train: 94 % loss 1.0027, 0:07 left",
        "train: 100 % loss 1.0025",
    ]


def test_items_that_take_long_show_their_progress(clock: Clock) -> None:
    sink, stream, _ = plain()
    report.configure(sink=sink)
    for _ in report.track("encode rows", range(100), 100):
        clock.now += 0.002
    assert stream.getvalue() == "", "what is over at once needs no line"
    for number in report.track("encode rows", range(1000), 1000):
        clock.now += 0.01
        if number == 99:
            assert stream.getvalue() == "encode rows: 8 %, 0:09 left\n", "within a second"
    assert stream.getvalue().splitlines()[-1] == "encode rows: 100 %"
    for _ in report.track("read rows", ["a" * 30, "b" * 60], 100, len):
        clock.now += 1
    assert stream.getvalue().splitlines()[-1] == "read rows: 100 %"


def test_the_time_left_does_not_count_what_an_earlier_run_did(clock: Clock) -> None:
    sink, stream, _ = plain()
    sink.advance("train", 500, 1000, "")
    clock.now += 3600
    sink.advance("train", 600, 1000, "")
    clock.now += 60
    sink.advance("train", 1000, 1000, "")
    assert stream.getvalue() == "train: 60 %, 4:00:00 left\ntrain: 100 %\n"


def test_a_label_that_comes_again_begins_again(clock: Clock) -> None:
    sink, stream, _ = plain()
    for _ in range(2):
        sink.advance("merge", 1, 4, "")
        clock.now += 20
        sink.advance("merge", 2, 4, "")
        sink.advance("merge", 4, 4, "")
    assert stream.getvalue() == "merge: 50 %, 0:40 left\nmerge: 100 %\n" * 2


FAILURE = DataError(
    "2 problems",
    hint="mend them",
    problems=[
        Problem("must be at least 1 (got 0)", "train.lora.r", "recipe.yaml", 12),
        Problem("is missing"),
    ],
)


def test_an_error_shows_every_problem_and_the_hint_last() -> None:
    sink, stream, errors = plain()
    report.configure(sink=sink)
    report.error(FAILURE)
    assert errors.getvalue() == (
        "error: recipe.yaml:12: train.lora.r: must be at least 1 (got 0)\n"
        "error: is missing\n"
        "error: 2 problems\n"
        "hint: mend them\n"
    )
    assert stream.getvalue() == ""


def test_with_json_the_last_line_of_standard_output_is_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    report.configure(as_json=True)
    report.info("chatter")
    report.output("data that the result carries")
    report.error(FAILURE)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "error": {
            "code": 2,
            "message": "2 problems",
            "hint": "mend them",
            "problems": [
                {
                    "file": "recipe.yaml",
                    "line": 12,
                    "field": "train.lora.r",
                    "message": "must be at least 1 (got 0)",
                },
                {"file": "", "line": 0, "field": "", "message": "is missing"},
            ],
        }
    }
    assert shown.err.splitlines()[0] == "chatter"


def test_without_json_data_is_printed_and_results_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    report.configure()
    report.output("{{ .Prompt }}")
    report.result({"go": "{{ .Prompt }}"})
    assert capsys.readouterr().out == "{{ .Prompt }}\n"


def test_streamed_text_keeps_out_of_the_way_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        report.configure(as_json=as_json)
        report.write("> ")
        report.write("Yes")
        shown = capsys.readouterr()
        assert (shown.err if as_json else shown.out) == "> Yes"
        assert (shown.out if as_json else shown.err) == ""


def test_an_error_survives_the_way_through_json() -> None:
    for kind in ForgeError.__subclasses__():
        there = kind("no", hint="yes", problems=FAILURE.problems)
        back = error_from_json(json.loads(json.dumps(there.as_json())))
        assert back.as_json() == there.as_json()
        assert back.code == kind.code
    assert isinstance(error_from_json(CheckError("no").as_json()), CheckError)
    assert type(error_from_json({"code": 77})) is ForgeError


def test_the_log_has_the_details_too_and_strange_bytes_do_no_harm(tmp_path: Path) -> None:
    sink, _, _ = plain()
    report.configure(sink=sink)
    log = tmp_path / "log.txt"
    with log.open("w", encoding="utf-8") as stream, report.copied_to(stream):
        report.detail("training on cpu")
        report.error(DataError("\udcff.yaml: no such recipe"))
    report.info("no longer in the log")
    lines = log.read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "detail: training on cpu",
        "error: \\udcff.yaml: no such recipe",
    ]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ", line) for line in lines)


SAYS = """
from forge import report
from forge.errors import DataError
report.configure()
report.info("→ [bold]not markup[/bold] :smile:")
for step in range(5):
    report.advance("merge", step, 4)
    report.advance("train", step, 4, "loss 1.25")
    report.info(f"between the bars {step}")
report.table("[1/8]", ("[a]",), [(":smile:",), (None,)])
report.advance("half", 1, 2)
report.error(DataError("broken \\udcff", hint="mend it"))
"""


def _on_a_terminal(environment: dict[str, str]) -> str:
    """What a program that says `SAYS` shows on a terminal of its own."""
    spawn = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-c', sys.argv[1]]))"
    finished = process.run([sys.executable, "-c", spawn, SAYS], environment=environment)
    assert finished.status == 0, finished.output
    return finished.output


@pytest.mark.programs
def test_a_terminal_gets_colours_and_bars() -> None:
    shown = _on_a_terminal({"TERM": "xterm-256color"})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    for said in ("→ [bold]not markup[/bold] :smile:", "between the bars 4", "100% loss 1.25", "[1/8]", "[a]"):
        assert said in text
    assert ":smile:" in text.partition("[a]")[2]
    assert "error: broken \\udcff" in text and "hint: mend it" in text
    assert "\x1b[1;31merror: broken" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"


@pytest.mark.programs
@pytest.mark.parametrize("environment", [{"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_without_colour_gets_plain_lines(environment: dict[str, str]) -> None:
    shown = _on_a_terminal(environment)
    assert "\x1b" not in shown
    assert "train: 100 % loss 1.25" in shown


@pytest.mark.programs
def test_an_encoding_without_the_letters_does_no_harm() -> None:
    says = "from forge import report; report.configure(as_json=True); report.result({'answer': 'é→🙂'}); "
    says += "report.configure(); report.output('é→')"
    environment = {"PYTHONIOENCODING": "ascii"}
    finished = process.run([sys.executable, "-c", says], environment=environment)
    first, second = finished.output.splitlines()
    assert json.loads(first) == {"answer": "é→🙂"}
    assert second == "\\xe9\\u2192"


def test_a_sink_is_chosen_anew_after_configure(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[Callable[[str], None]] = [report.info, report.warning]
    report.configure()
    for say in lines:
        say("here")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("here\n", "warning: here\n")
