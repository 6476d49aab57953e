"""Inputs that people reported in public, through a ship's data stage: each is read or refused by name.

The inputs are in `cases/data`; the base is the built-in one, whose template is ChatML. Not covered: tools
and thinking, whose rendering is the template's (`test_data_thinking`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forge import report
from forge.errors import DataError
from forge.model.base import BUILTIN
from forge.runs.files import MANIFEST
from forge.ship.drive import ship
from tests.told_sink import Told
from tests.vocabularies import trl_template

pytestmark = pytest.mark.training
CASES = Path(__file__).parent / "cases" / "data"


@dataclass(frozen=True)
class Read:
    """What the data stage made of a case."""

    facts: Mapping[str, Any]
    rows: list[dict[str, Any]]
    lines: list[str]

    def messages(self, line: int) -> list[tuple[str, str]]:
        return [(one["role"], one["content"]) for one in self.rows[line]["messages"]]


Run = Callable[..., Read]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Ship a case as far as its data; `data` and `train` are fields of the recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "store"))

    def run(
        source: Path, *, train: Mapping[str, Any] | None = None, base: str = "builtin:tiny", **data: Any
    ) -> Read:
        recipe = {
            "name": "case",
            "base": base,
            "data": {"source": str(source), "eval": 0, **data},
            "train": {"method": "lora", "max_steps": 2, **(train or {})},
        }
        (tmp_path / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        told = Told()
        report.configure(sink=told)
        ship(tmp_path / "r.yaml", until="data")
        manifest = json.loads((tmp_path / "runs" / "case" / MANIFEST).read_text(encoding="utf-8"))
        rows = max((tmp_path / "store").glob("**/train.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        lines = rows.read_text(encoding="utf-8").splitlines()
        return Read(
            manifest["facts"]["data"], [json.loads(line) for line in lines], [text for _, text in told.texts]
        )

    return run


def other_template(directory: Path, template: str) -> str:
    """The built-in base with another chat template."""
    directory.mkdir()
    for path in (BUILTIN / "tiny").iterdir():
        (directory / path.name).hardlink_to(path)
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return str(directory)


def supervised(row: Mapping[str, Any]) -> int:
    return sum(label >= 0 for label in row["labels"])


def test_a_csv_with_one_long_field(run: Run, tmp_path: Path) -> None:
    """biolab/orange3 2404, pytorch/text 549: Python's reader stops at 131,072 characters."""
    short = "".join(f'"q{n}, ""quoted""\nsecond line",a{n}\n' for n in range(8))
    (tmp_path / "d.csv").write_text(f"prompt,completion\n{short}long,{'word ' * 32_000}\n", encoding="utf-8")
    read = run(tmp_path / "d.csv", train={"max_length": 128}, overlong="drop")
    assert [row["messages"][1]["content"] for row in read.rows] == [f"a{n}" for n in range(8)]
    assert read.rows[0]["messages"][0]["content"] == 'q0, "quoted"\nsecond line'


def test_content_parts(run: Run) -> None:
    """yaolinli/TimeChat-Online 3, lm-sys/FastChat 3017: text parts are joined."""
    assert run(CASES / "content_parts" / "d.jsonl").messages(0) == [("user", "q0"), ("assistant", "a0")]


def test_csv_long_field(run: Run, tmp_path: Path) -> None:
    """biolab/orange3 2404, pytorch/text 549: a value longer than Python's csv takes by default is CSV."""
    lines = [
        "prompt,completion",
        *(f'"q{n}, ""quoted""\nsecond line",a{n}' for n in range(20)),
        "x" * 160_000 + ",y",
    ]
    (tmp_path / "d.csv").write_text("\n".join(lines), encoding="utf-8")
    read = run(tmp_path / "d.csv", overlong="drop", train={"max_length": 128})
    assert len(read.rows) == 20
    assert read.messages(3)[0] == ("user", 'q3, "quoted"\nsecond line')
    assert "1 of 21 rows are longer than 128 tokens and were left out" in read.lines


def test_hint_names_wrong_field(run: Run, tmp_path: Path) -> None:
    """modelscope/ms-swift 9829, hiyouga/LlamaFactory 9092: the hint names a field that is there and works."""
    base = other_template(tmp_path / "qwen3", trl_template("qwen3"))
    source, variables = (
        CASES / "hint_names_wrong_field" / "d.jsonl",
        {"template_variables": {"enable_thinking": False}},
    )
    every = run(source, base=base, train=variables)
    assert all(row.get("answers", 1) == 1 for row in every.rows)
    assert len(every.rows) == 40
    assert len(run(source, base=base, train={**variables, "supervise": "last"}).rows) == 20


def test_variables_that_the_template_does_not_read(run: Run) -> None:
    """modelscope/ms-swift 9829: a setting that changes nothing is an error (invariant 2)."""
    with pytest.raises(DataError, match="the chat template reads no enable_thinking") as caught:
        run(
            CASES / "content_parts" / "d.jsonl",
            train={"template_variables": {"enable_thinking": False}},
        )
    assert caught.value.code == 2


def test_jsonl_named_json(run: Run, tmp_path: Path) -> None:
    """zai-org/ChatGLM-6B 1196: lines of JSON in a .json, and a list in a .jsonl: the content decides."""
    rows = run(CASES / "jsonl_named_json" / "d.json").rows
    assert len(rows) == 20
    as_list = [json.loads(line) for line in (CASES / "jsonl_named_json" / "d.json").read_text().splitlines()]
    (tmp_path / "list.jsonl").write_text(json.dumps(as_list, indent=2), encoding="utf-8")
    assert run(tmp_path / "list.jsonl").rows == rows
    (tmp_path / "table.jsonl").write_text("prompt,completion\nHi,Hello.\nBye,Bye.\n", encoding="utf-8")
    assert run(tmp_path / "table.jsonl").messages(1) == [("user", "Bye"), ("assistant", "Bye.")]


def test_lone_surrogate(run: Run) -> None:
    """huggingface/transformers 8886, openai/tiktoken 82: half a character is named, or left out."""
    with pytest.raises(DataError) as caught:
        run(CASES / "lone_surrogate" / "d.jsonl")
    assert caught.value.code == 2
    assert [str(one) for one in caught.value.problems] == [
        "d.jsonl:21: messages[0].content: has half a character (lone surrogate)"
    ]
    read = run(CASES / "lone_surrogate" / "d.jsonl", skip_bad_rows=1)
    assert len(read.rows) == 20
    assert read.facts["bad_rows"] == [
        "d.jsonl:21: messages[0].content: has half a character (lone surrogate)"
    ]


def test_half_a_character_in_a_column(run: Run, tmp_path: Path) -> None:
    """huggingface/transformers 8886: a refusal that quotes it can be written down."""
    (tmp_path / "d.jsonl").write_text('{"p\\ud83d": "q", "c": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="cannot tell the data's format"):
        run(tmp_path / "d.jsonl")


def test_a_pattern_in_a_recipe(run: Run, tmp_path: Path) -> None:
    """E1: `*.jsonl` has the suffix of a file and is none."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            f'{{"prompt": "{name}", "completion": "c"}}\n', encoding="utf-8"
        )
    assert len(run(Path("*.jsonl")).rows) == 2
    with pytest.raises(DataError, match=r"data\.source: no file matches none-\*\.jsonl"):
        run(Path("none-*.jsonl"))


def test_message_weight(run: Run) -> None:
    """axolotl PR 1702, OpenAI's format: an answer of weight 0 is seen and carries no loss."""
    read = run(CASES / "message_weight" / "d.jsonl")
    assert read.facts["first_row"]["supervised"] == "good 0<|im_end|>"
    assert "bad 0" in read.facts["first_row"]["text"]
    assert all(row["answers"] == 1 for row in read.rows)


def test_null_system(run: Run, tmp_path: Path) -> None:
    """Megatron-Bridge PR 5660: null and "" both mean no system turn, whatever the format."""
    read = run(CASES / "null_system" / "d.jsonl", columns={"system": "sys"})
    assert read.messages(0) == [("system", "be kind"), ("user", "h0"), ("assistant", "g0")]
    assert read.messages(1) == [("user", "h1"), ("assistant", "g1")]


def test_sharegpt_roles(run: Run) -> None:
    """axolotl 1654, LlamaFactory PR 1314."""
    read = run(CASES / "sharegpt_roles" / "d.jsonl")
    assert read.messages(0) == [("user", "h0"), ("assistant", "g0")]
    assert read.facts["read"][0].endswith("sharegpt (conversations as messages)")


@pytest.mark.parametrize("columns", [{"system": "system"}, {}])
def test_system_column_sharegpt(run: Run, columns: Mapping[str, str]) -> None:
    """hiyouga/LlamaFactory 2464, 5866: the column acts, named or not."""
    read = run(CASES / "system_column_sharegpt" / "d.jsonl", columns=columns)
    assert read.messages(0) == [("system", "You are a pirate 0"), ("user", "q0"), ("assistant", "good 0")]
    assert read.facts["unused"] == {}


def test_trailing_user(run: Run) -> None:
    """hiyouga/LlamaFactory 2962: the answers that are there are learned, and the cut is reported."""
    read = run(CASES / "trailing_user" / "d.jsonl")
    assert read.facts["notes"] == {"what follows the last answer was cut: nothing in it is learned": 1}
    assert all(row["messages"][-1]["role"] == "assistant" for row in read.rows)


def test_trl_conversational_prompt(run: Run) -> None:
    """huggingface/trl 5213: prompt and completion as lists are one conversation."""
    read = run(CASES / "trl_conversational_prompt" / "d.jsonl")
    assert read.messages(0) == [("user", "q0"), ("assistant", "a0")]


def test_truncated_away(run: Run) -> None:
    """trl 3910: how many rows had no answer left is said."""
    read = run(CASES / "truncated_away" / "d.jsonl", overlong="truncate", train={"max_length": 40})
    kept, (said,) = len(read.rows), [line for line in read.lines if "longer than 40 tokens" in line]
    total = len((CASES / "truncated_away" / "d.jsonl").read_text().splitlines())
    assert kept == total - 5
    assert said.endswith("and 5 had no answer left and were left out")
    assert all(supervised(row) for row in read.rows)
