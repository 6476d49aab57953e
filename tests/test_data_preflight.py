"""What a plan says of the rows before anything runs, and the recipe that `forge init` writes for them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from forge import report
from forge.cli.main import run_command
from forge.recipe.load import load
from forge.recipe.schema import Train
from forge.ship.drive import plan, ship
from tests.conftest import copy_of_tiny

pytestmark = pytest.mark.training

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "store"))
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def planned(recipe: Path) -> list[str]:
    said = io.StringIO()
    report.configure(sink=report.PlainSink(said, said))
    plan(recipe)
    return said.getvalue().splitlines()


def test_a_plan_says_what_was_read(place: Path) -> None:
    """E13, F9: format and why, rows, tokens, steps, what is not used, and a row with its mask."""
    rows = [{"Question": f"q{n}", "Answer": "a", "id": n} for n in range(19)]
    write(place / "rows.jsonl", [*rows, {**rows[0], "id": 20}])
    (place / "r.yaml").write_text(
        "name: a\nbase: builtin:tiny\ndata: {source: rows.jsonl, eval: 2}\n"
        "train: {epochs: 2, batch_size: 4}\n",
        encoding="utf-8",
    )
    said = planned(place / "r.yaml")
    assert (
        said[0]
        == "read rows.jsonl (JSON lines): 20 rows, question (Question as prompt, Answer as completion)"
    )
    assert said[1].startswith("rows: 18 to train on")
    assert said[1].endswith("2 held out")
    assert said[2].startswith("tokens a row: ")
    assert "not used: id" in said
    assert "training: 10 steps of 4 rows" in said
    assert said[-1] == "⟦a<|im_end|>⟧"
    assert not (place / "runs").exists()
    assert not (place / "store").exists()


def test_a_plan_reads_parquet_and_names_what_it_leaves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E7: data sets of the hub are Parquet; of rows that a plan does not read it says so."""
    import pyarrow.parquet

    rows = [{"question": f"q{number}", "answer": "a"} for number in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    (place / "r.yaml").write_text("name: a\nbase: builtin:tiny\ndata: {source: rows.parquet, eval: 2}\n")
    assert planned(place / "r.yaml")[0].startswith("read rows.parquet (Parquet): 20 rows, question")
    monkeypatch.setattr("forge.stages.data._READ_BY_A_PLAN", 1)
    assert planned(place / "r.yaml")[0].startswith("rows: not read by a plan")


def test_a_plan_refuses_what_the_template_cannot_show(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that a ship would refuse is refused by its plan, with file and line."""
    write(
        place / "rows.jsonl",
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "x<|im_end|>y"}] * 4,
    )
    (place / "r.yaml").write_text(
        "name: a\nbase: builtin:tiny\ndata: {source: rows.jsonl, eval: 0}\n", encoding="utf-8"
    )
    assert run_command(["plan", "r.yaml", "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["problems"]
    assert (problem["file"], problem["line"]) == ("rows.jsonl", 2)


SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "prompt": {"prompt": "Hi", "completion": "Hello."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
    "dolly": {"instruction": "Hi", "context": "", "response": "Hello."},
    "question": {"question": "Hi", "answer": "Hello."},
    "preference": {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."},
    "text": {"text": "Once upon a time."},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_recipe_writes_itself(place: Path, shape: str) -> None:
    """For every shape of rows a recipe that is valid and reads them, with its smoke queries out of them."""
    rows = [
        json.loads(json.dumps(SHAPES[shape]).replace("Hello.", f"Hello {n}.").replace("time.", f"time {n}."))
        for n in range(12)
    ]
    write(place / "rows.jsonl", rows)
    assert run_command(["init", "first", "--base", "builtin:tiny", "--data", "rows.jsonl"]) == 0
    recipe = load(place / "first.yaml").recipe
    assert recipe.train is not None
    assert recipe.export is not None and recipe.export.quant == "q8_0"  # of a base this small
    assert bool(recipe.smoke) == (shape != "text")
    ship(place / "first.yaml", until="data")
    assert len(list((place / "store").glob("**/train.jsonl"))) == 1


def test_the_first_recipe_of_a_base_without_a_chat_template(place: Path) -> None:
    """N4: it names a shipped one and says why; rows of plain text need none."""
    base = copy_of_tiny(place / "base")
    (base / "chat_template.jinja").unlink()
    write(place / "rows.jsonl", [{"prompt": f"Say {n}.", "completion": f"{n} it is."} for n in range(30)])
    assert run_command(["init", "first", "--base", "./base", "--data", "rows.jsonl"]) == 0
    text = (place / "first.yaml").read_text()
    assert '  chat_template: "alpaca"  # the base has none; ' in text
    assert run_command(["plan", "first.yaml"]) == 0
    stated = json.loads((base / "tokenizer_config.json").read_text())
    named = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    stated["chat_template"] = [{"name": name, "template": named} for name in ("tools", "rag")]
    (base / "tokenizer_config.json").write_text(json.dumps(stated))
    assert run_command(["init", "second", "--base", "./base", "--data", "rows.jsonl"]) == 0
    assert '  chat_template: "rag"  # the base\'s own are rag, tools; ' in (place / "second.yaml").read_text()
    (place / "plain.txt").write_text("A river runs by the house.\n\n" * 40)
    assert run_command(["init", "third", "--base", "./base", "--data", "plain.txt"]) == 0
    assert "chat_template" not in (place / "third.yaml").read_text()


def test_the_first_recipe_of_rows_with_variables(place: Path) -> None:
    """A variable of the template that every row has alike is the recipe's."""
    base = copy_of_tiny(place / "base")
    template = base / "chat_template.jinja"
    source = template.read_text()
    template.unlink()
    template.write_text("{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}" + source)
    rows = [
        {"messages": [{**USER, "content": f"Hi {n}"}, ANSWER], "enable_thinking": False} for n in range(12)
    ]
    write(place / "rows.jsonl", rows)
    assert run_command(["init", "first", "--base", "./base", "--data", "rows.jsonl"]) == 0
    training = load(place / "first.yaml").recipe.train
    assert isinstance(training, Train)
    assert training.template_variables == {"enable_thinking": False}
    ship(place / "first.yaml", until="data")
    write(place / "rows.jsonl", [{**rows[0], "enable_thinking": True}, *rows[1:]])
    assert run_command(["init", "second", "--base", "./base", "--data", "rows.jsonl"]) == 2


def test_the_first_recipe_elsewhere(place: Path) -> None:
    """The data's path is the recipe's; conversations become messages; an odd text is quoted."""
    odd = 'a "quote" # and: more\nlines'
    turns = [{"role": "system", "content": "Be brief."}, {**USER, "content": odd}, ANSWER]
    write(place / "rows.jsonl", [{"messages": turns}])
    assert run_command(["init", "first", "--base", "builtin:tiny", "--data", "rows.jsonl", "-C", "sub"]) == 0
    recipe = load(place / "sub" / "first.yaml").recipe
    assert recipe.data is not None
    assert recipe.data.source == "../rows.jsonl"
    assert recipe.smoke[0].messages is not None
    assert recipe.smoke[0].messages[-1].content == odd


def test_the_first_recipe_of_what_is_asked_for(place: Path) -> None:
    """A set of several splits, and rows that want a setting: it stands in the recipe, paths as its own."""
    (place / "set").mkdir()
    for split in ("train", "test"):
        rows = [{"q": f"Say {n} {split}.", "a": f"{n}.", "options": ["x", "y"]} for n in range(12)]
        write(place / "set" / f"{split}.jsonl", rows)
    asked = ["data.columns={prompt: q, completion: a}", "data.ignore=[options]", "data.split=train[:8]"]
    line = ["init", "first", "--base", "builtin:tiny", "--data", "set", "-C", "sub"]
    line += [word for text in [*asked, "data.eval=set/test.jsonl"] for word in ("-o", text)]
    assert run_command(line) == 0
    loaded = load(place / "sub" / "first.yaml")
    data = loaded.recipe.data
    assert data is not None
    assert (data.source, data.split, data.eval) == ("../set", "train[:8]", "../set/test.jsonl")
    assert (data.columns.prompt, data.columns.completion, data.ignore) == ("q", "a", ("options",))
    assert loaded.recipe.smoke[0].prompt is not None
    assert loaded.recipe.smoke[0].prompt.endswith("test.")
    assert run_command(["plan", "sub/first.yaml"]) == 0


@pytest.mark.parametrize("text", ["train.epochs=3", "data.source=b", "data.ignor=[a]"])
def test_init_sets_what_there_is_of_the_data(text: str, place: Path) -> None:
    write(place / "rows.jsonl", [{"prompt": "Hi", "completion": "Hello."}])
    assert run_command(["init", "first", "--base", "builtin:tiny", "--data", "rows.jsonl", "-o", text]) == 2
    assert run_command(["init", "first", "-o", text]) == 2
    assert not (place / "first.yaml").exists()


@pytest.mark.parametrize("text", ["data.ignore=[topic]", "data.roles={kunde: user}"])
def test_init_refuses_names_that_no_row_has(text: str, place: Path) -> None:
    write(place / "rows.jsonl", [{"messages": [USER, ANSWER]}])
    assert run_command(["init", "first", "--base", "builtin:tiny", "--data", "rows.jsonl", "-o", text]) == 2


def test_init_wants_both(place: Path) -> None:
    assert run_command(["init", "first", "--base", "builtin:tiny"]) == 2
    write(place / "rows.jsonl", [{"a": 1}])
    assert run_command(["init", "first", "--base", "builtin:tiny", "--data", "rows.jsonl"]) == 2
    assert not (place / "first.yaml").exists()
