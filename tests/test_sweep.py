"""`forge sweep`: what a sweep expands to, what is refused before anything runs, and how its runs go.

Ships are made up here (`finished_runs`), but for the slow test's.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from forge import report
from forge.cli import sweep as command
from forge.cli.main import run_command
from forge.commands import sweep as sweeping
from forge.errors import CheckError, ForgeError, InterruptedByUserError, RecipeError, StageError
from forge.recipe.load import Loaded
from forge.recipe.sweep import Sweep, load_sweep, shipped_sweeps
from forge.runs.figures import Figures
from forge.ship.drive import plan_quietly
from tests.finished_runs import RECIPE, write_finished
from tests.shipping import Workshop

RANKS = "recipe: recipe.yaml\nfields: {train.lora.r: [4, 8, 16]}\n"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(json.dumps({"name": "plain", **RECIPE}), encoding="utf-8")


def loaded(text: str, *overrides: str, **options: Any) -> Sweep:
    Path("s.yaml").write_text(text, encoding="utf-8")
    return load_sweep(Path("s.yaml"), overrides, **options)


def values(sweep: Sweep) -> list[dict[str, Any]]:
    return [dict(one.values) for one in sweep.combinations]


def named(sweep: Sweep) -> list[str]:
    return [one.name for one in sweep.combinations]


def test_fields_are_multiplied_and_runs_stand_over_them() -> None:
    sweep = loaded(
        "name: try\nrecipe: recipe.yaml\nuntil: train\n"
        "fields: {train.lora.r: [4, 8], train.epochs: 1, data.limit: [5, 6]}\n"
        "runs: [{train.method: lora}, {train.method: qlora, data.limit: 9}]\n"
    )
    assert (sweep.name, sweep.until) == ("try", "train")
    assert named(sweep) == [
        "try-lora-r4-limit5", "try-lora-r4-limit6", "try-lora-r8-limit5", "try-lora-r8-limit6",
        "try-qlora-r4-limit9", "try-qlora-r8-limit9",
    ]  # fmt: skip
    first = sweep.combinations[0]
    assert first.values == {"train.method": "lora", "train.lora.r": 4, "data.limit": 5}
    assert first.label == "method lora, r 4, limit 5"
    train = first.loaded.recipe.train
    assert train and getattr(train, "epochs", None) == 1, "the same in all, so no part of a name"
    assert first.loaded.directory == Path.cwd()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{recipe: recipe.yaml, fields: {export.quant: [f16, q8_0]}}", ["s-f16", "s-q8_0"]),
        (
            "{recipe: recipe.yaml, fields: {train.lora.targets: [attention, [q_proj, v_proj]]}}",
            ["s-attention", "s-q_proj-v_proj"],
        ),
        ("{name: r, recipe: recipe.yaml, fields: {train.lora.r: [4, 8]}}", ["r-4", "r-8"]),
        ("{runs: [recipe.yaml, {recipe: other.yaml, train.epochs: 2}]}", ["s-recipe", "s-other-epochs2"]),
        ("{fields: {recipe: [recipe.yaml, other.yaml]}}", ["s-recipe", "s-other"]),
        ("{recipe: recipe.yaml, runs: [{name: a}, {name: b, train.epochs: 1}]}", ["a", "b"]),
        (
            "{recipe: recipe.yaml, fields: {base.chat_template: [chatml, " + "x" * 70 + "]}}",
            ["s-51586e8e", "s-00c6c633"],
        ),
    ],
)
def test_names_say_the_values(text: str, names: list[str]) -> None:
    Path("other.yaml").write_text(json.dumps({"name": "o", **RECIPE}), encoding="utf-8")
    assert named(loaded(text)) == names


def test_the_command_line_stands_over_the_file() -> None:
    overrides = ("train.lora.r=[2, 3]", "train.epochs=1")
    sweep = loaded(RANKS, *overrides, until="data", recipe=Path("recipe.yaml"))
    assert values(sweep) == [{"train.lora.r": 2}, {"train.lora.r": 3}] and sweep.until == "data"
    sweep = loaded(
        "{recipe: recipe.yaml, runs: [{train.lora.r: 4, data.limit: 5}, {train.lora.r: 8}]}", overrides[0]
    )
    assert len(values(sweep)) == 4 and values(sweep)[0] == {"data.limit": 5, "train.lora.r": 2}


def test_a_recipe_is_a_sweep_of_what_the_command_line_says() -> None:
    sweep = load_sweep(Path("recipe.yaml"), ["export.quant=[f16, q8_0]", "train.epochs=1"])
    assert values(sweep) == [{"export.quant": "f16"}, {"export.quant": "q8_0"}]
    assert named(sweep) == ["recipe-f16", "recipe-q8_0"]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            "recipe: recipe.yaml\nfields:\n  train.lora.rr: [4, 8]\n  train.epochs: [1, 0]\n",
            [
                "s.yaml:3: train.lora.rr: unknown key; did you mean r?",
                "s.yaml:4: train.epochs: must be greater than 0 (got 0)",
            ],
        ),
        ("recipe: recipe.yaml\nfields: {train.lora.r: []}\n", ["s.yaml:2: train.lora.r: is an empty list"]),
        ("recipe: recipe.yaml\nfields: {data.limit: [4, 4]}\n", ["s.yaml:2: data.limit: 4 is there twice"]),
        (
            "recipe: recipe.yaml\nfields: {train.epochs: [1, 1.0]}\n",
            ["s.yaml: two runs are the same: s-epochs1 and s-epochs1.0"],
        ),
        ("recipe: recipe.yaml\nfields: {}\n", ["s.yaml:2: fields: must be a mapping"]),
        ("recipe: recipe.yaml\nfields: [a]\n", ["s.yaml:2: fields: must be a mapping"]),
        ("recipe: recipe.yaml\nruns: []\n", ["s.yaml:2: runs: is an empty list"]),
        ("recipe: recipe.yaml\nruns: [3]\n", ["s.yaml:2: runs.0: must be a recipe, or fields"]),
        ("recipe: recipe.yaml\nfield: {data.limit: [4]}\n", ["s.yaml:2: field: unknown key; did you mean f"]),
        ("fields: {train.lora.r: [4]}\n", ["s.yaml:1: recipe: is required"]),
        ("recipe: 3\n", ["s.yaml:1: recipe: must be text"]),
        ("name: a/b\nrecipe: recipe.yaml\n", ["s.yaml:1: name: 'a/b' must be usable as a file name"]),
        ("recipe: gone.yaml\nfields: {train.lora.r: [4, 8]}\n", ["gone.yaml: no such recipe"]),
        ("recipe: recipe.yaml\nruns: [{data.limit: 5}, {data.limit: 5}]\n", ["s.yaml: two runs are"]),
        ("recipe: recipe.yaml\nruns: [{name: a}, {name: a, data.limit: 5}]\n", ["s.yaml: two runs have"]),
        ("- a\n", ["s.yaml: is not a mapping"]),
        ("recipe: [\n", ["s.yaml:2: is not valid YAML"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once_with_its_line(text: str, problems: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(text)
    said = [str(problem) for problem in caught.value.problems]
    assert len(said) == len(problems), said
    assert all(line.startswith(start) for line, start in zip(said, problems, strict=True)), said


def test_wrong_overrides_are_named() -> None:
    for override, said in (("train.lora.r", "must look like"), ("train.lora.r=[]", "is an empty list")):
        with pytest.raises(RecipeError) as caught:
            loaded(RANKS, override)
        assert said in str(caught.value.problems[0])
    with pytest.raises(RecipeError) as caught:
        loaded(RANKS, "train.lora.rr=3")
    assert str(caught.value.problems[0]) == "-o train.lora.rr: unknown key; did you mean r?"


def test_many_runs_are_asked_about_and_too_many_refused() -> None:
    ten = "[" + ", ".join(map(str, range(1, 11))) + "]"
    four = (
        f"recipe: recipe.yaml\nfields: {{train.lora.r: {ten}, train.lora.alpha: {ten}, train.epochs: {ten}, "
        + (f"data.limit: {ten}}}\n")
    )
    for answer in (False, True):
        with pytest.raises(
            RecipeError, match=r"^10,000 runs \(10 of train.lora.r x .*: a sweep has at most 1,000"
        ):
            loaded(four, ask=lambda question, answer=answer: answer)
    text = f"recipe: recipe.yaml\nfields: {{train.lora.r: {ten}, train.lora.alpha: {ten[:-1]}, 11]}}\n"
    with pytest.raises(RecipeError, match=r"^110 runs .*: more than 100 are begun only when") as caught:
        loaded(text)
    assert "--yes" in caught.value.hint
    assert len(loaded(text, ask=lambda question: question.startswith("110 runs (10 of")).combinations) == 110


@pytest.mark.parametrize(
    ("typed", "arguments", "is_terminal", "begun"),
    [
        ("y\n", (), True, 110), ("YES\n", (), True, 110), ("", (), True, 0), ("n\n", (), True, 0),
        ("y\n", (), False, 0), ("", ("--yes",), False, 110), ("y\n", ("--json",), True, 0),
    ],
)  # fmt: skip
def test_a_person_at_a_terminal_is_asked(
    typed: str,
    arguments: tuple[str, ...],
    is_terminal: bool,
    begun: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forge_home: Path,
) -> None:
    """T1: more than 100 runs are asked about first; without a terminal they are refused, and --yes named."""
    many = json.dumps([*range(1, 111)])
    Path("s.yaml").write_text(f"recipe: recipe.yaml\nfields: {{train.lora.r: {many}}}\n", encoding="utf-8")
    shipped: list[str] = []

    def ship(recipe: Loaded, *, until: str | None) -> None:
        shipped.append(recipe.recipe.name)
        write_finished(recipe.recipe)

    monkeypatch.setattr("forge.commands.sweep.ship", ship)
    monkeypatch.setattr("forge.commands.sweep._plans", lambda sweep: [])
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert run_command(["sweep", "s.yaml", *arguments]) == (0 if begun else 2)
    said = capsys.readouterr().err
    assert len(shipped) == begun
    asked = is_terminal and not arguments
    assert ("110 runs (110 of train.lora.r): begin them? [y/N]" in said) == asked
    assert ("--yes" in said) == (not begun)


_ON_A_REAL_MODEL = [pytest.mark.slow, pytest.mark.programs, pytest.mark.training]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=_ON_A_REAL_MODEL if name == "rank" else []) for name in shipped_sweeps()],
)
def test_a_sweep_that_comes_with_forge_loads_and_plans(name: str, forge_home: Path) -> None:
    sweep = load_sweep(Path(name))
    assert len(sweep.combinations) > 2 and all(values(sweep))
    for one in (sweep.combinations[0], sweep.combinations[-1]):
        stages = plan_quietly(one.loaded, sweep.until).stages
        assert stages[-1].name == sweep.until and not any(stage.cached for stage in stages)


def test_a_plan_shows_every_run_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], forge_home: Path
) -> None:
    assert run_command(["sweep", "rank", "--recipe", "recipe.yaml", "--plan", "--json"]) == 0
    shown = capsys.readouterr()
    fields = json.loads(shown.out.splitlines()[-1])
    assert [one["name"] for one in fields["runs"]][:2] == ["rank-r4-alpha8", "rank-r8-alpha16"]
    assert fields["runs"][0]["stages"] == dict.fromkeys(("data", "train", "validate", "evaluate"), False)
    assert "  rank-r8-alpha16   r 8, alpha 16   data, train, validate, evaluate  0" in shown.err
    assert not Path("runs").exists() and not (forge_home / "runs").exists()


def test_the_ready_sweeps_are_those_that_the_help_names() -> None:
    assert shipped_sweeps() == (
        "attention", "learning_rate", "memory", "packing", "quantization", "rank", "targets"
    )  # fmt: skip
    said = " ".join(str(command.command.help).split())
    assert f"({', '.join(shipped_sweeps())})" in said
    with pytest.raises(RecipeError, match="there is no sweep rang"):
        load_sweep(Path("rang"))


Ship = Callable[[Loaded], None]


@pytest.fixture
def swept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forge_home: Path
) -> Callable[..., tuple[dict[str, Any], str, list[str]]]:
    """Runs `forge sweep` with a ship of the test's own: its JSON, what it said, the runs that were begun."""

    def sweep(ship: Ship, *arguments: str, code: int = 0) -> tuple[dict[str, Any], str, list[str]]:
        begun: list[str] = []

        def shipped(recipe: Loaded, *, until: str | None) -> None:
            begun.append(recipe.recipe.name)
            ship(recipe)

        monkeypatch.setattr("forge.commands.sweep.ship", shipped)
        assert run_command(["sweep", "s.yaml", *arguments, "--json"]) == code
        report.close()
        shown = capsys.readouterr()
        return json.loads(shown.out.splitlines()[-1]), shown.err, begun

    Path("s.yaml").write_text(RANKS, encoding="utf-8")
    return sweep


def finish(recipe: Loaded) -> None:
    write_finished(recipe.recipe)


def test_every_run_is_shipped_and_shown(swept: Callable[..., Any]) -> None:
    fields, said, begun = swept(finish)
    assert begun == ["s-r4", "s-r8", "s-r16"]
    assert [one["values"] for one in fields["runs"]] == [{"train.lora.r": rank} for rank in (4, 8, 16)]
    assert [one["figures"]["loss_after"] for one in fields["runs"]] == [4.0, 20 / 9, 20 / 17]
    assert all(one["ok"] and one["outcome"] == "shipped" for one in fields["runs"])
    assert json.loads(Path(fields["table"]).read_text(encoding="utf-8")) == fields
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "run 2 of 3: s-r8: r 8" in lines
    assert "8 8,000 2.2222 0.00% 3.00 MB 0.02 97.00% 2.00 GB 3.5 s shipped" in lines
    page = Path(fields["plot"]).read_text(encoding="utf-8")
    assert page.count("<svg") == 9 and "Held-out loss by trainable parameters" in page
    assert "http" not in page and "<script" not in page and ">r 16</text>" in page
    picture = Path(fields["picture"]).read_text(encoding="utf-8")
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    assert ">r 16</text>" in picture and "held-out loss by trainable parameters" in picture
    for title in ("KL mean", "Training memory", "File size", "Training time", "Top-1"):
        assert f"<h2>{title.capitalize()}</h2>" in page


def test_a_run_that_fails_is_recorded_and_the_others_go_on(swept: Callable[..., Any]) -> None:
    def ship(recipe: Loaded) -> None:
        if recipe.recipe.name == "s-r8":
            raise StageError("train: it has exploded", hint="lower the rate")
        finish(recipe)

    fields, said, begun = swept(ship, code=4)
    assert begun == ["s-r4", "s-r8", "s-r16"]
    assert [one["ok"] for one in fields["runs"]] == [True, False, True]
    assert fields["runs"][1]["outcome"] == "train: it has exploded"
    assert fields["error"]["message"] == "1 of 3 runs failed"
    assert [one["field"] for one in fields["error"]["problems"]] == ["s-r8"]
    assert "warning: s-r8 failed: train: it has exploded" in said
    assert "train: it has exploded" in Path("runs/s.sweep.html").read_text(encoding="utf-8")


def test_a_failure_that_was_recorded_has_its_figures_and_an_old_manifest_none(
    swept: Callable[..., Any],
) -> None:
    def ship(recipe: Loaded) -> None:
        if recipe.recipe.name == "s-r4":
            write_finished(recipe.recipe, outcome="nothing was learned")
            raise CheckError("nothing was learned")
        if recipe.recipe.name == "s-r8":
            finish(recipe)  # by an earlier ship
            raise CheckError("quantize broke it")
        finish(recipe)

    fields, _, _ = swept(ship, code=5)
    first, second, third = fields["runs"]
    assert (first["ok"], first["figures"]["trainable_parameters"]) == (False, 4000)
    assert second["figures"] == dict.fromkeys(Figures.__dataclass_fields__)
    assert third["ok"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), InterruptedByUserError("training stopped at step 3")])
def test_ctrl_c_stops_it_and_says_how_to_go_on(stop: BaseException, swept: Callable[..., Any]) -> None:
    def ship(recipe: Loaded) -> None:
        if recipe.recipe.name == "s-r8":
            raise stop
        finish(recipe)

    fields, said, begun = swept(ship, code=130)
    assert begun == ["s-r4", "s-r8"]
    assert fields["error"]["message"] == (
        "the sweep was stopped; 1 of 3 runs are done; not finished: s-r8, s-r16"
    )
    assert "what is finished comes from the store" in fields["error"]["hint"] and "Traceback" not in said
    assert [one["outcome"] for one in fields["runs"]] == ["shipped", None, None]
    kept = json.loads(Path("runs/s.sweep.json").read_text(encoding="utf-8"))
    assert kept["runs"] == fields["runs"]
    assert "not run" in Path("runs/s.sweep.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "train.lora.rr=[1]"), "unknown key; did you mean r?"),
        (("-o", "base.chat_template=[chatml, nothing-of-this-name]"), "nothing-of-this-name"),
        (("--until", "verifi"), "--until verifi: this recipe has no such stage"),
        (("--recipe", "gone.yaml"), "no such recipe"),
    ],
)
def test_nothing_runs_where_one_of_the_runs_cannot(
    arguments: tuple[str, ...], message: str, swept: Callable[..., Any]
) -> None:
    fields, _, begun = swept(finish, *arguments, code=2)
    assert begun == [] and not Path("runs").exists()
    said = [one["message"] for one in fields["error"]["problems"]]
    assert len(said) == 1 and message in said[0], said


def test_a_bug_in_a_run_is_no_failure_of_it(swept: Callable[..., Any]) -> None:
    def ship(recipe: Loaded) -> None:
        raise ZeroDivisionError

    fields, _, begun = swept(ship, code=ForgeError.code)
    assert begun == ["s-r4"] and "a bug in forge" in fields["error"]["message"]


@pytest.mark.slow
@pytest.mark.programs
@pytest.mark.training
def test_a_real_sweep_shares_what_is_common_and_is_found_again(workshop: Workshop) -> None:
    workshop.recipe(train={"max_steps": 2})
    (workshop.directory / "s.yaml").write_text(
        "recipe: recipe.yaml\nuntil: train\nfields: {train.lora.r: [2, 4]}\n", encoding="utf-8"
    )
    for is_again in (False, True):
        answer = workshop.forge("sweep", "s.yaml")
        assert answer.code == 0, answer.said
        figures = [one["figures"] for one in answer.fields["runs"]]
        assert figures[1]["trainable_parameters"] == 2 * figures[0]["trainable_parameters"] > 0
        assert all(one["peak_memory_bytes"] > 1e8 and one["training_seconds"] > 0 for one in figures)
        assert [one["cached"] for one in figures] == ([2, 2] if is_again else [0, 1])


@pytest.mark.slow
@pytest.mark.programs
@pytest.mark.training
def test_runs_are_spread_over_gpus(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is here, so each run says in its reader which one it was given."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    (workshop.directory / "readers.py").write_text(
        "import os\n"
        "def read(row):\n"
        "    gpus = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "    assert gpus == '5,7' or os.environ['CUDA_DEVICE_ORDER'] == 'PCI_BUS_ID'\n"
        "    if row['answer'] == 'stop' and gpus != '5,7':\n"
        "        raise ValueError('not in the plan, which has both')\n"
        "    with open('gpus.txt', 'a') as file:\n"
        "        file.write(gpus + '\\n')\n"
        "    turns = zip(('user', 'assistant'), (row['question'], row['answer']))\n"
        "    return {'messages': [{'role': role, 'content': content} for role, content in turns]}\n"
    )
    rows = [{"question": f"What is {number}?", "answer": f"It is {number}."} for number in range(12)]
    rows[10]["answer"] = "stop"
    (workshop.directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workshop.directory / "recipe.yaml").write_text(
        "name: mini\nbase: builtin:tiny\ndata: {source: rows.jsonl, format: 'readers:read', eval: 0}\n"
    )
    (workshop.directory / "s.yaml").write_text(
        "recipe: recipe.yaml\nuntil: data\nfields: {data.limit: [8, 9, 10, 12]}\n"
    )
    answer = workshop.forge("sweep", "s.yaml", "--devices", "auto")
    assert answer.code == 2, answer.said
    assert [run["ok"] for run in answer.fields["runs"]] == [True, True, True, False]
    assert [problem["field"] for problem in answer.fields["error"]["problems"]] == ["s-limit12"]
    assert "run 2 of 4 on GPU 1: s-limit9" in answer.said
    assert {"5", "7"} <= set((workshop.directory / "gpus.txt").read_text().split())


def test_ctrl_c_behind_the_last_run_has_nothing_to_name(
    swept: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweeping._keep

    def keep(result: sweeping.SweepResult) -> None:
        real(result)
        if all(run.outcome for run in result.runs) and not Path("stopped").exists():
            Path("stopped").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr("forge.commands.sweep._keep", keep)
    fields, _, _ = swept(finish, code=130)
    assert fields["error"]["message"] == "the sweep was stopped; 3 of 3 runs are done"


def test_a_run_on_several_gpus_has_no_place_on_one(
    swept: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    for more in ((), ("--plan",)):
        options = ("--devices", "0,1", "-o", "train.devices=2", *more)
        fields, _, begun = swept(finish, *options, code=2)
        assert begun == []
        assert fields["error"]["message"] == (
            "--devices gives each run one GPU, and s-r4 has 2 in train.devices"
        )


@pytest.mark.parametrize(
    ("devices", "code", "message"),
    [
        ("0,two", 2, "--devices 0,two: no numbers of GPUs"),
        ("0,2", 3, "--devices: there is no GPU 2 here, only GPUs 0 to 1"),
    ],
)
def test_gpus_that_are_not_there(
    devices: str, code: int, message: str, swept: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    for more in ((), ("--plan",)):
        fields, _, begun = swept(finish, "--devices", devices, *more, code=code)
        assert fields["error"]["message"] == message and begun == []
