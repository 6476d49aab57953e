"""Rows as the interfaces and trainers that people come from document them: each is read, or refused by name.

The rows are in `cases/data/dialects`, each with what it must become or with the words that refuse it.
Not covered: what a template makes of the turns (`test_data_thinking`).
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.data.conversation import Row
from forge.data.conversations import to_conversations
from forge.errors import DataError
from tests import fuzz

EACH = 40  # mutants of a row
DIALECTS = Path(__file__).parent / "cases" / "data" / "dialects"


def cases(name: str) -> list[Any]:
    lines = (DIALECTS / name).read_text(encoding="utf-8").splitlines()
    return [pytest.param(case, id=case["name"]) for case in map(json.loads, lines)]


@pytest.mark.parametrize("case", cases("read.jsonl"))
def test_a_dialect_that_is_read(case: Mapping[str, Any]) -> None:
    """E1, E2, E5, E7: nothing of the row is dropped in silence, and calls, tools and loss are kept."""
    reading = to_conversations([Row(case["row"], "rows.jsonl", 1)])
    (conversation,) = reading.conversations
    assert conversation.messages() == case["messages"]
    assert [dict(tool) for tool in conversation.tools] == case.get("tools", [])
    assert reading.format == case["format"]
    assert sorted(reading.notes.unused) == case.get("unused", [])
    untrained = [number for number, turn in enumerate(conversation.turns) if turn.trained is False]
    assert untrained == case.get("untrained", [])


@pytest.mark.parametrize("case", cases("refused.jsonl"))
def test_a_dialect_that_is_refused(case: Mapping[str, Any]) -> None:
    """Pitfalls 15 and 51: what would be learned otherwise than the row says is named, with the way out."""
    with pytest.raises(DataError) as caught:
        to_conversations([Row(case["row"], "rows.jsonl", 1)])
    error = caught.value
    assert (str(error.problems[0]) if error.problems else error.message) == case["error"]
    if "hint" in case:
        assert error.hint == case["hint"]


def test_booleans_are_not_counted_as_numbers() -> None:
    """Pitfall 51: what was done to rows is noted as what it is."""
    rows = [{"question": "Is it?", "answer": True}, {"question": "2+2?", "answer": 4}]
    reading = to_conversations([Row(row, "rows.jsonl", 1) for row in rows])
    ways = "written as JSON; data.format: module:function gives other words"
    assert reading.notes.counts == {f"booleans in answer, {ways}": 1, f"numbers in answer, {ways}": 1}


def test_cells_that_say_nothing_are_noted() -> None:
    """Pitfall 51: pandas' `nan` in an answer is learned as that word, which is said."""
    rows = [{"instruction": "q", "input": "nan", "output": "NULL"}]
    reading = to_conversations([Row(row, "rows.csv", 2) for row in rows])
    is_cell = "learned as a word: an empty cell of a table?"
    assert reading.conversations and reading.notes.counts == {
        f"input says only nan, {is_cell}": 1,
        f"output says only NULL, {is_cell}": 1,
    }


def test_rows_of_another_split_are_noted() -> None:
    """Pitfall 51: rows of a test split among those of training are said."""
    rows = [{"prompt": "q", "completion": "a", "split": split} for split in ("train", "Held-Out")]
    reading = to_conversations([Row(row, "rows.csv", 2) for row in rows])
    assert reading.conversations
    assert reading.notes.counts == {"split is Held-Out: were they meant to be held out?": 1}


def test_many_columns_are_named_in_short() -> None:
    """One object of questions and answers has its rows as columns."""
    row = {f"What is {number}, {'really ' * 40}?": "a" for number in range(400)}
    with pytest.raises(DataError, match=r"What is 3, really .*\.\.\. and 370 more$") as caught:
        to_conversations([Row(row, "rows.json", 1)])
    assert len(caught.value.message) < 1200


@pytest.mark.parametrize("name", ["read.jsonl", "refused.jsonl"])
def test_mutants_of_dialects(name: str) -> None:
    """Pitfall 15: a row with an odd value in any place is read, or is a row that cannot be used."""
    for case in cases(name):
        for seed in range(EACH):
            (described,) = case.values
            row = fuzz.value_of(described["row"], random.Random(f"{described['name']} {seed}"))
            if isinstance(row, dict):
                with contextlib.suppress(DataError):
                    to_conversations([Row(row, "rows.jsonl", 1)])


@pytest.mark.parametrize("beside", [{}, {"choices": [{"message": {"role": "assistant", "content": "b"}}]}])
def test_a_row_that_is_nested_too_deeply(beside: Mapping[str, Any]) -> None:
    """Pitfall 15: what no reader can follow is a row that cannot be used, not a traceback."""
    deep: Any = {}
    for _ in range(sys.getrecursionlimit()):
        deep = {"items": deep}
    call = {"name": "f", "arguments": deep}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    with pytest.raises(DataError) as caught:
        to_conversations([Row({"messages": messages, **beside}, "rows.jsonl", 1)])
    (problem,) = caught.value.problems
    assert str(problem).endswith("is nested too deeply")


def test_schemas_in_capitals() -> None:
    """Gemini's types are STRING and OBJECT; a property called type keeps its own."""
    schema = {"type": "OBJECT", "properties": {"type": {"type": "STRING", "enum": ["STRING"]}}}
    row = {
        "contents": [
            {"role": "user", "parts": [{"text": "Hi"}]},
            {"role": "model", "parts": [{"text": "Hello."}]},
        ],
        "tools": [{"function_declarations": [{"name": "f", "parameters": schema}]}],
    }
    (conversation,) = to_conversations([Row(row, "rows.jsonl", 1)]).conversations
    assert conversation.tools[0]["function"] == {
        "name": "f",
        "parameters": {"type": "object", "properties": {"type": {"type": "string", "enum": ["STRING"]}}},
    }
