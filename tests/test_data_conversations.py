"""Rows become conversations, or are named; and the split keeps equal rows together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from forge.data.conversation import Conversation, Json
from forge.data.conversations import detect_format, to_conversations
from forge.data.sources import Row
from forge.data.split import refuse_overlap, split
from forge.errors import DataError, Problem

USER: dict[str, Json] = {"role": "user", "content": "Hi"}
ANSWER: dict[str, Json] = {"role": "assistant", "content": "Hello."}
SYSTEM: dict[str, Json] = {"role": "system", "content": "Be brief."}


def row(line: int = 1, **values: Any) -> Row:
    return Row(values, "rows.jsonl", line)


FORMS: Mapping[str, tuple[Row, Mapping[str, str], list[dict[str, Json]]]] = {
    "prompt": (row(prompt="Hi", completion="Hello."), {}, [USER, ANSWER]),
    "mapped columns": (
        row(sentence="Hi", translation="x", translation_extra="Hello."),
        {"prompt": "sentence", "completion": "translation_extra"},
        [USER, ANSWER],
    ),
    "mapped system": (
        row(s="Be brief.", prompt="Hi", completion="Hello."),
        {"prompt": "prompt", "completion": "completion", "system": "s"},
        [SYSTEM, USER, ANSWER],
    ),
    "empty system": (
        row(s=" ", prompt="Hi", completion="Hello."),
        {"prompt": "prompt", "completion": "completion", "system": "s"},
        [USER, ANSWER],
    ),
    "messages": (row(messages=[SYSTEM, USER, ANSWER]), {}, [SYSTEM, USER, ANSWER]),
    "conversations": (row(conversations=[USER, ANSWER, USER, ANSWER]), {}, [USER, ANSWER, USER, ANSWER]),
    "mapped messages": (
        row(chat=[USER, ANSWER], prompt="x", completion="y"),
        {"messages": "chat"},
        [USER, ANSWER],
    ),
    "sharegpt": (
        row(conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]),
        {},
        [USER, ANSWER],
    ),
    "alpaca": (
        row(instruction="Add", input="1 2", output="3"),
        {},
        [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    "alpaca without input": (
        row(instruction="Hi", input="", output="Hello.", text="### ..."),
        {},
        [USER, ANSWER],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str) -> None:
    """E1, E2, E5, E6, E8."""
    given, columns, expected = FORMS[form]
    (conversation,) = to_conversations([given], "auto", columns)
    assert conversation.messages() == expected
    assert conversation.place == given.place


def test_content_is_not_trimmed_or_changed() -> None:
    (one,) = to_conversations([row(prompt="  a\n", completion="\tb ")], "prompt", {})
    assert [turn.content for turn in one.turns] == ["  a\n", "\tb "]


FAULTS: Mapping[str, tuple[Row, Problem]] = {
    "missing column": (row(prompt="Hi"), Problem("there is no such column", "completion")),
    "empty": (row(prompt=" ", completion="x"), Problem("is empty", "prompt")),
    "not text": (row(prompt="Hi", completion=3), Problem("is int, not text", "completion")),
    "null": (row(prompt=None, completion="x"), Problem("is NoneType, not text", "prompt")),
    "no list": (row(messages="Hi"), Problem("is not a list of messages", "messages")),
    "empty list": (row(messages=[]), Problem("is not a list of messages", "messages")),
    "no object": (row(messages=["Hi"]), Problem("is not a list of messages", "messages")),
    "unknown role": (
        row(messages=[{"role": "human", "content": "Hi"}, ANSWER]),
        Problem("role 'human' is not one of system, user, assistant", "messages[0]"),
    ),
    "tool role": (
        row(messages=[USER, {"role": "tool", "content": "3"}, ANSWER]),
        Problem("role 'tool' is not one of system, user, assistant", "messages[1]"),
    ),
    "tool call": (
        row(messages=[USER, {**ANSWER, "tool_calls": [1]}]),
        Problem("has tool_calls, which is not supported", "messages[1]"),
    ),
    "no content": (
        row(messages=[USER, {"role": "assistant"}]),
        Problem("there is no such column", "messages[1].content"),
    ),
    "content parts": (
        row(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]),
        Problem("is list, not text", "messages[0].content"),
    ),
    "ends with the user": (
        row(messages=[USER, ANSWER, USER]),
        Problem("the last message is not the assistant's: there is nothing to learn"),
    ),
    "late system": (row(messages=[USER, SYSTEM, ANSWER]), Problem("a system message that is not the first")),
    "no user": (row(messages=[SYSTEM, ANSWER]), Problem("no message is the user's")),
    "unknown speaker": (
        row(conversations=[{"from": "bard", "value": "Hi"}]),
        Problem("from 'bard' is not one of human, gpt, system", "conversations[0]"),
    ),
}
FORM_OF = {"unknown speaker": "sharegpt", "missing column": "prompt"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_cannot_be_used_is_named(fault: str) -> None:
    """Pitfalls 15 and 51: nothing is dropped or guessed."""
    given, problem = FAULTS[fault]
    with pytest.raises(DataError, match=r"^1 of 1 rows cannot be used$") as caught:
        to_conversations([given], FORM_OF.get(fault, "auto"), {})
    assert caught.value.problems == (Problem(problem.message, problem.field, "rows.jsonl", 1),)
    assert caught.value.hint.startswith("the columns are: ")


def test_every_bad_row_is_told_at_once() -> None:
    rows = [row(n, prompt="a", completion="b" if n % 2 else "") for n in range(1, 7)]
    with pytest.raises(DataError, match="3 of 6 rows cannot be used") as caught:
        to_conversations(rows, "auto", {})
    assert [str(problem) for problem in caught.value.problems] == [
        f"rows.jsonl:{n}: completion: is empty" for n in (2, 4, 6)
    ]


def test_formats_are_told_apart_or_refused() -> None:
    assert detect_format(row(messages=[USER], prompt="", completion=""), {}) == "messages"
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: cannot tell the data's format from its columns: a, b"
    ):
        detect_format(row(a=1, b=2), {})
    with pytest.raises(DataError, match="plain text has no turns"):
        to_conversations([row(text="x")], "text", {})


def conversations(count: int, *, copies: int = 1) -> list[Conversation]:
    rows = [row(n, prompt=f"question {n % (count // copies)}", completion="x") for n in range(count)]
    return to_conversations(rows, "prompt", {})


@pytest.mark.parametrize(("share", "expected"), [(0.1, 10), (0.0, 0), (7, 7), (0.5, 50)])
def test_split_sizes(share: float, expected: int) -> None:
    """E9."""
    rows = conversations(100)
    training, heldout = split(rows, share, 42)
    assert len(heldout) == expected
    assert len(training) == 100 - expected
    assert sorted(one.place.line for one in training + heldout) == list(range(100))


def test_equal_rows_stay_on_one_side() -> None:
    """Pitfall 63."""
    training, heldout = split(conversations(100, copies=4), 0.2, 42)
    assert not {one.fingerprint() for one in training} & {one.fingerprint() for one in heldout}
    assert 20 <= len(heldout) < 24
    refuse_overlap(training, heldout)


def test_the_split_depends_on_text_and_seed_alone() -> None:
    rows = conversations(60)
    held = {one.fingerprint() for one in split(rows, 6, 42)[1]}
    assert held == {one.fingerprint() for one in split(rows[::-1], 6, 42)[1]}
    assert held != {one.fingerprint() for one in split(rows, 6, 43)[1]}
    more = to_conversations([row(99, prompt="a new row", completion="x")], "prompt", {})
    assert len(held & {one.fingerprint() for one in split(rows + more, 6, 42)[1]}) >= 5


def test_no_training_row_left() -> None:
    with pytest.raises(DataError, match="10 held-out rows of 10 leaves none to train on"):
        split(conversations(10), 10, 42)


def test_all_copies_of_one_row_cannot_be_split() -> None:
    with pytest.raises(DataError, match="leaves none to train on"):
        split(conversations(10, copies=10), 0.1, 42)


def test_overlap_of_two_files_is_refused() -> None:
    """Pitfall 63: a held-out row that is trained on proves nothing."""
    rows = conversations(5)
    with pytest.raises(DataError, match="2 held-out rows are training rows too") as caught:
        refuse_overlap(rows, rows[3:])
    assert [problem.line for problem in caught.value.problems] == [3, 4]
