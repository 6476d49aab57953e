"""Rows become conversations, or are named; and the split keeps equal rows together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest

from forge import report
from forge.codec import Json
from forge.data.conversation import Conversation, Row
from forge.data.conversations import to_conversations
from forge.data.layout import Shape
from forge.data.problems import BadRows
from forge.data.split import refuse_overlap, split
from forge.errors import DataError
from tests.told_sink import Told

USER: dict[str, Json] = {"role": "user", "content": "Hi"}
ANSWER: dict[str, Json] = {"role": "assistant", "content": "Hello."}
SYSTEM: dict[str, Json] = {"role": "system", "content": "Be brief."}


def row(line: int = 1, **values: Any) -> Row:
    return Row(values, "rows.jsonl", line)


CALL: dict[str, Json] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
RESULT: dict[str, Json] = {"role": "tool", "content": "3"}
NAMED: Mapping[str, str] = {"prompt": "sentence", "completion": "translation_extra"}

# What is read -> the row, the recipe's columns, the messages, and the format that is shown.
FORMS: Mapping[str, tuple[Row, Mapping[str, str], list[dict[str, Json]], str]] = {
    "prompt": (row(prompt="Hi", completion="Hello."), {}, [USER, ANSWER], "prompt"),
    "mapped columns": (
        row(sentence="Hi", translation="x", translation_extra="Hello."),
        NAMED,
        [USER, ANSWER],
        "prompt",
    ),
    "the thinking of whose answer is mapped": (
        row(question="Hi", r1_reasoning="Greet.", gemini_thinking="Greet!", r1_answer="Hello."),
        {"completion": "r1_answer"},
        [USER, {**ANSWER, "reasoning_content": "Greet."}],
        "prompt",
    ),
    "mapped thinking": (
        row(question="Hi", steps_thinking=["Greet."], solution="No.", attempt="Hello."),
        {"completion": "attempt", "reasoning": "steps_thinking"},
        [USER, {**ANSWER, "reasoning_content": "Greet."}],
        "prompt",
    ),
    "mapped system": (
        row(s="Be brief.", prompt="Hi", completion="Hello."),
        {"system": "s"},
        [SYSTEM, USER, ANSWER],
        "prompt",
    ),
    "empty system": (row(s=" ", prompt="Hi", completion="Hello."), {"system": "s"}, [USER, ANSWER], "prompt"),
    "null system": (row(system=None, prompt="Hi", completion="Hello."), {}, [USER, ANSWER], "prompt"),
    "question": (row(Question="Hi", ANSWER="Hello."), {}, [USER, ANSWER], "question"),
    "prompt and response": (row(prompt="Hi", response="Hello."), {}, [USER, ANSWER], "prompt"),
    "input and output": (row(Input="Hi", Output="Hello."), {}, [USER, ANSWER], "prompt"),
    "system_prompt": (
        row(system_prompt="Be brief.", question="Hi", response="Hello."),
        {},
        [SYSTEM, USER, ANSWER],
        "prompt",
    ),
    "lists of messages": (row(prompt=[USER], completion=[ANSWER]), {}, [USER, ANSWER], "prompt"),
    "lists of messages as text": (
        row(prompt=json.dumps([SYSTEM, USER]), completion=json.dumps([ANSWER])),
        {},
        [SYSTEM, USER, ANSWER],
        "prompt",
    ),
    "thinking": (
        row(question="Hi", reasoning="Hm.", answer="Hello."),
        {},
        [USER, {**ANSWER, "reasoning_content": "Hm."}],
        "question",
    ),
    "messages": (row(messages=[SYSTEM, USER, ANSWER]), {}, [SYSTEM, USER, ANSWER], "messages"),
    "conversations": (
        row(conversations=[USER, ANSWER, USER, ANSWER]),
        {},
        [USER, ANSWER, USER, ANSWER],
        "messages",
    ),
    "mapped messages": (
        row(chat=[USER, ANSWER], prompt="x", completion="y"),
        {"messages": "chat"},
        [USER, ANSWER],
        "messages",
    ),
    "messages beside a null": (
        row(messages=None, conversations=[USER, ANSWER]),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "messages as JSON": (row(messages=json.dumps([USER, ANSWER])), {}, [USER, ANSWER], "messages"),
    "messages as a literal": (row(messages=repr([USER, ANSWER])), {}, [USER, ANSWER], "messages"),
    "a struct of lists": (
        row(messages={"role": ["user", "assistant"], "content": ["Hi", "Hello."]}),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "a system column": (
        row(system="Be brief.", messages=[USER, ANSWER]),
        {},
        [SYSTEM, USER, ANSWER],
        "messages",
    ),
    "empty system turn": (
        row(messages=[{"role": "system", "content": ""}, USER, ANSWER]),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "null system turn": (
        row(messages=[{"role": "system", "content": None}, USER, ANSWER]),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "two system turns": (
        row(messages=[SYSTEM, {"role": "developer", "content": "Be kind."}, USER, ANSWER]),
        {},
        [{"role": "system", "content": "Be brief.\n\nBe kind."}, USER, ANSWER],
        "messages",
    ),
    "late system": (row(messages=[USER, SYSTEM, ANSWER]), {}, [USER, SYSTEM, ANSWER], "messages"),
    "ends with the user": (row(messages=[USER, ANSWER, USER]), {}, [USER, ANSWER], "messages"),
    "content parts": (
        row(
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                ANSWER,
            ]
        ),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "Gemini's": (
        row(
            systemInstruction={"parts": [{"text": "Be brief."}]},
            contents=[
                {"role": "user", "parts": [{"text": "Hi"}]},
                {"role": "model", "parts": [{"text": "Hello."}]},
            ],
        ),
        {},
        [SYSTEM, USER, ANSWER],
        "messages",
    ),
    "exchanges": (
        row(conversation=[{"system": "Be brief.", "input": "Hi", "output": "Hello."}]),
        {},
        [SYSTEM, USER, ANSWER],
        "messages",
    ),
    "turns without a role": (row(conversations=["Hi", "Hello."]), {}, [USER, ANSWER], "messages"),
    "sharegpt": (
        row(conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]),
        {},
        [USER, ANSWER],
        "sharegpt",
    ),
    "sharegpt of others": (
        row(conversations=[{"from": "User", "value": "Hi"}, {"from": "ChatGPT", "value": "Hello."}]),
        {},
        [USER, ANSWER],
        "sharegpt",
    ),
    "role with value": (
        row(conversations=[{"role": "human", "value": "Hi"}, {"role": "bing", "value": "Hello."}]),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "sharegpt with system": (
        row(
            system="Be brief.",
            conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
        ),
        {"system": "system"},
        [SYSTEM, USER, ANSWER],
        "sharegpt",
    ),
    "sharegpt with tools": (
        row(
            conversations=[
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "Hello."},
            ]
        ),
        {},
        [USER, CALL, RESULT, ANSWER],
        "sharegpt",
    ),
    "tool calls": (
        row(messages=[USER, {**CALL, "content": None}, RESULT, ANSWER]),
        {},
        [USER, CALL, RESULT, ANSWER],
        "messages",
    ),
    "arguments as text": (
        row(
            messages=[
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
                    ],
                },
                {**RESULT, "tool_call_id": "c1"},
                ANSWER,
            ]
        ),
        {},
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
                ],
            },
            {**RESULT, "tool_call_id": "c1"},
            ANSWER,
        ],
        "messages",
    ),
    "an old function call": (
        row(
            messages=[
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "add", "arguments": '{"a": 1}'},
                },
                {"role": "function", "name": "add", "content": "3"},
                ANSWER,
            ]
        ),
        {},
        [USER, CALL, {**RESULT, "name": "add"}, ANSWER],
        "messages",
    ),
    "alpaca": (
        row(instruction="Add", input="1 2", output="3"),
        {},
        [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
        "alpaca",
    ),
    "alpaca without input": (
        row(instruction="Hi", input="", output="Hello.", text="### ..."),
        {},
        [USER, ANSWER],
        "alpaca",
    ),
    "alpaca mapped": (
        row(instruction="Add", input="1 2", output="3"),
        {"prompt": "instruction", "completion": "output"},
        [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
        "alpaca",
    ),
    "alpaca with history and system": (
        row(instruction="Hi", input=None, output="Hello.", history=[["Hi", "Hello."]], system="Be brief."),
        {},
        [SYSTEM, USER, ANSWER, USER, ANSWER],
        "alpaca",
    ),
    "dolly": (
        row(instruction="Add", context="1 2", response="3", category="qa"),
        {},
        [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
        "dolly",
    ),
    "preference": (row(prompt="Hi", chosen="Hello.", rejected="Go."), {}, [USER, ANSWER], "preference"),
    "preference of messages": (
        row(prompt=[SYSTEM, USER], chosen=[ANSWER], rejected=[ANSWER]),
        {},
        [SYSTEM, USER, ANSWER],
        "preference",
    ),
    "preference of conversations": (
        row(prompt="Hi", chosen=[USER, ANSWER], rejected=[USER, ANSWER]),
        {},
        [USER, ANSWER],
        "preference",
    ),
    "preference of dialogues": (
        row(chosen="\n\nHuman: Hi\n\nAssistant: Hello.", rejected="\n\nHuman: Hi\n\nAssistant: Go."),
        {},
        [USER, ANSWER],
        "preference",
    ),
    "a key for each role": (
        row(messages=[{"user": "Hi"}, {"assistant": "Hello."}]),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "firefly": (row(conversation=[{"human": "Hi", "assistant": "Hello."}]), {}, [USER, ANSWER], "messages"),
    "sender": (
        row(messages=[{"sender": "human", "text": "Hi"}, {"sender": "assistant", "text": "Hello."}]),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "ChatGPT's export": (
        row(
            messages=[
                {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}
                for role, text in (("user", "Hi"), ("assistant", "Hello."))
            ]
        ),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "parts by other keys": (
        row(
            messages=[
                {**USER, "content": [{"type": "text", "content": "Hi"}]},
                {**ANSWER, "content": [{"type": "text", "value": "Hello."}]},
            ]
        ),
        {},
        [USER, ANSWER],
        "messages",
    ),
    "prompt and completion of parts": (
        row(prompt=[{"type": "text", "text": "Hi"}], completion=[{"type": "text", "text": "Hello."}]),
        {},
        [USER, ANSWER],
        "prompt",
    ),
    "thinking among the parts": (
        row(
            messages=[
                USER,
                {
                    **ANSWER,
                    "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello."}],
                },
            ]
        ),
        {},
        [USER, {**ANSWER, "reasoning_content": "Hm."}],
        "messages",
    ),
    "the same system twice": (
        row(system="Be brief.", messages=[SYSTEM, USER, ANSWER]),
        {},
        [SYSTEM, USER, ANSWER],
        "messages",
    ),
    "guanaco": (row(text="### Human: Hi### Assistant: Hello."), {}, [USER, ANSWER], "text"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str) -> None:
    """E1, E2, E5, E6, E7, E8: every shape that people have, under the names that they use."""
    source, columns, expected, shown = FORMS[form]
    reading = to_conversations([source], Shape(columns=columns))
    (conversation,) = reading.conversations
    assert conversation.messages() == expected
    assert conversation.place == source.place
    assert reading.format == shown


def test_plain_text_is_learned_whole() -> None:
    """E3."""
    (conversation,) = to_conversations([row(text="Once upon a time.")]).conversations
    assert (conversation.turns, conversation.text) == ((), "Once upon a time.")


def test_tools_are_carried() -> None:
    """A `tools` column that is dropped trains a model that never saw the tools it is served with."""
    bare: dict[str, Json] = {"name": "add", "parameters": {"type": "object"}}
    wrapped: Json = {"type": "function", "function": bare}
    for value in ([wrapped], [bare], json.dumps([bare])):
        (one,) = to_conversations([row(messages=[USER, ANSWER], tools=value)]).conversations
        assert list(one.tools) == [wrapped]


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"trainable": "false"},
        {"training": 0},
        {"loss": False},
        {"loss_scale": 0},
        {"is_trainable": False},
        {"masked": True},
        {"ignore_loss": 1},
    ],
)
def test_a_turn_says_that_it_carries_no_loss(mark: Mapping[str, Json]) -> None:
    """OpenAI's `weight: 0`, axolotl's `training: false`, ms-swift's `loss: false` (axolotl PR 1702)."""
    turns = [USER, {**ANSWER, **mark}, USER, {**ANSWER, "weight": 1}]
    (one,) = to_conversations([row(messages=turns)]).conversations
    assert [turn.trained for turn in one.turns] == [None, False, None, True]
    (alone,) = to_conversations([row(messages=[USER, ANSWER, {**USER, "weight": 1}, ANSWER])]).conversations
    assert [turn.trained for turn in alone.turns] == [None] * 4


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"label": False}])
def test_a_row_says_that_it_is_not_learned(mark: Mapping[str, Json]) -> None:
    reading = to_conversations(
        [
            Row({"prompt": "Hi", "completion": "No.", **mark}, "rows.jsonl", 1),
            row(2, prompt="Hi", completion="Hello."),
        ]
    )
    assert [one.place.line for one in reading.conversations] == [2]
    (key,) = mark
    assert list(reading.notes.counts) == [f"left out: {key} is {str(mark[key]).lower()}"]
    silent = to_conversations(
        [row(messages=[USER, {**ANSWER, "weight": 0}]), row(2, messages=[USER, ANSWER])]
    )
    assert [one.place.line for one in silent.conversations] == [2]


def test_what_plays_no_part_is_listed() -> None:
    turns = [{**USER, "id": 7}, {**ANSWER, "model": "m"}]
    reading = to_conversations(
        [row(messages=turns, source="x", id=1, category=None), row(2, messages=turns, source="y")]
    )
    assert reading.notes.unused == {"source": 2, "id": 1, "messages[].id": 2, "messages[].model": 2}
    assert (
        to_conversations(
            [row(prompt="Hi", completion="Hello.", topic="t")], Shape(ignore=("topic",))
        ).notes.unused
        == {}
    )


def test_names_with_half_a_character_can_be_written() -> None:
    """huggingface/transformers 8886: of a key that is not used, too."""
    turns = [USER, {**ANSWER, "\ud83d": 1}]
    reading = to_conversations([Row({"messages": turns, "\udc00": 1}, "rows.jsonl", 1)])
    assert reading.notes.unused == {"messages[].\\ud83d": 1, "\\udc00": 1}


def test_who_was_taken_for_whom_is_shown() -> None:
    turns = [{"from": "Kunde", "value": "Hi"}, {"from": "chatgpt", "value": "Hello."}]
    reading = to_conversations([row(conversations=turns)], Shape(roles={"kunde": "user"}))
    assert reading.notes.roles == {"Kunde": "user", "chatgpt": "assistant"}


def test_content_is_not_trimmed_or_changed() -> None:
    (one,) = to_conversations([row(prompt="  a\n", completion="\tb ")]).conversations
    assert [turn.content for turn in one.turns] == ["  a\n", "\tb "]
    (brackets,) = to_conversations([row(prompt="[1, 2]", completion='{"a": 1}')]).conversations
    assert [turn.content for turn in brackets.turns] == ["[1, 2]", '{"a": 1}']


WEIGHT = (
    "a row's weight can be 0 or 1 here: data.ignore: [weight] leaves it out of account, "
    "and a source in data.source can have a weight"
)
FAULTS: Mapping[str, tuple[Row, str]] = {
    "empty": (row(prompt=" ", completion="x"), "prompt: is empty"),
    "null": (row(prompt=None, completion="x"), "prompt: is null"),
    "no list": (
        row(messages="Hi"),
        "messages: is a text, not a list of messages; data.columns: {prompt: messages, completion: ...} "
        "takes it as a question",
    ),
    "empty list": (row(messages=[]), "messages: is empty"),
    "no object": (row(messages=[1]), "messages: is not a list of messages"),
    "no content": (row(messages=[USER, {"role": "assistant"}]), "messages[1].content: there is no such key"),
    "empty answer": (row(messages=[USER, {**ANSWER, "content": ""}]), "messages[1].content: is empty"),
    "null answer": (row(messages=[USER, {**ANSWER, "content": None}]), "messages[1].content: is empty"),
    "a picture": (
        row(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]),
        "messages[0].content[0]: is a part of type 'image_url'; only text can be learned here",
    ),
    "a picture beside": (
        row(prompt="Hi", completion="x", image="a.png"),
        "image: only text can be learned here; data.ignore: [image] leaves it out of account",
    ),
    "several answers": (
        row(prompt="Hi", completion=["a", "b"]),
        "completion: is a list, not one text; data.format: module:function makes one of it",
    ),
    "a table's nothing": (row(prompt="Hi", completion=math.nan), "completion: is empty"),
    "no role": (
        row(messages=[{"content": "Hi"}, ANSWER]),
        "messages[0]: role is missing; its keys are: content",
    ),
    "an array's text": (
        row(messages="[{'role': 'user'} {'role': 'assistant'}]"),
        "messages: is a text that is neither JSON nor a Python list of messages",
    ),
    "no user": (row(messages=[SYSTEM, ANSWER]), "no message is the user's"),
    "no answer": (
        row(messages=[USER, USER]),
        "there is no turn of the assistant: there is nothing to learn",
    ),
    "thinking without an end": (
        row(messages=[USER, {**ANSWER, "content": "<think>Hm, let me"}]),
        "messages[1].content: <think> is never closed: the answer was cut off while thinking",
    ),
    "a loss by an unknown name": (
        row(messages=[USER, {**ANSWER, "learn_this": False}]),
        "messages[1].learn_this: forge does not know this key, and it may say what carries loss: "
        "weight: 0 (or 1) does; take it out if it does not",
    ),
    "a row's loss by an unknown name": (
        row(messages=[USER, ANSWER], mask_history=True),
        "mask_history: forge does not know this column, and it may say what carries loss: weight: 0 (or 1) "
        "does; data.ignore: [mask_history] leaves it out of account",
    ),
    "tools in a message": (
        row(messages=[{**SYSTEM, "tools": [{"name": "add"}]}, USER, ANSWER]),
        "messages[0].tools: tools belong to the whole row: a column of the row beside its messages",
    ),
    "half a weight": (
        row(messages=[USER, {**ANSWER, "weight": 0.5}]),
        "messages[1].weight: is 0.5; only 0 and 1 (false and true) are supported",
    ),
    "a trained question": (
        row(messages=[{**USER, "train": True}, ANSWER]),
        "messages[0].train: a turn of the user cannot carry loss here",
    ),
    "a contradiction": (
        row(messages=[USER, {**ANSWER, "train": True, "weight": 0}]),
        "messages[1]: its keys contradict each other about the loss",
    ),
    "a heavy row": (row(prompt="Hi", completion="x", weight=0.5), f"weight: is 0.5; {WEIGHT}"),
    "loss of prompts": (
        row(prompt="Hi", completion="x", train_on_input=True),
        "train_on_input: prompts carry no loss here; data.ignore: [train_on_input] leaves it out of account",
    ),
    "tokens": (
        row(prompt="Hi", completion="x", input_ids=[1, 2]),
        "input_ids: the row is tokenized already; give its text or its messages; "
        "data.ignore: [input_ids] leaves it out of account",
    ),
    "half a character": (
        row(messages=[{**USER, "content": "Hi \ud83d"}, ANSWER]),
        "messages[0].content: has half a character (lone surrogate)",
    ),
    "half a character in a call": (
        row(
            messages=[
                USER,
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]},
            ]
        ),
        "messages[1].tool_calls: has half a character (lone surrogate)",
    ),
    "no arguments": (
        row(messages=[USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}]),
        "messages[1].tool_calls: the arguments of a call are not a JSON object",
    ),
    "tools that are none": (row(messages=[USER, ANSWER], tools="add"), "tools: is not a list of tools"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_cannot_be_used_is_named(fault: str) -> None:
    """Pitfalls 15 and 51: nothing is dropped or guessed."""
    source, message = FAULTS[fault]
    with pytest.raises(DataError, match=r"^1 of 1 rows cannot be used$") as caught:
        to_conversations([source])
    (problem,) = caught.value.problems
    assert str(problem) == f"rows.jsonl:1: {message}"


def test_an_unknown_speaker_is_told_the_names_and_the_field() -> None:
    with pytest.raises(DataError) as caught:
        to_conversations(
            [
                row(conversations=[{"from": "Kunde", "value": "Hi"}]),
                row(2, conversations=[{"from": "Kunde", "value": "Hi"}]),
            ]
        )
    (problem,) = caught.value.problems
    assert problem.message.startswith("from 'Kunde' is none of: user, human")
    assert problem.message.endswith("data.roles: {NAME: user} adds a name (2 times; also 2)")


def test_equal_problems_are_counted_once() -> None:
    rows = [row(n, prompt="a", completion="b" if n % 2 else "") for n in range(1, 13)]
    with pytest.raises(DataError, match="6 of 12 rows cannot be used") as caught:
        to_conversations(rows)
    assert [str(problem) for problem in caught.value.problems] == [
        "rows.jsonl:2: completion: is empty (6 times; also 4, 6, 8, ...)"
    ]


def test_rows_of_different_shapes_are_told_apart() -> None:
    """A mixed file: which columns there are, and where they begin."""
    with pytest.raises(DataError, match="1 of 2 rows cannot be used") as caught:
        to_conversations([row(messages=[USER, ANSWER]), row(2, prompt="x", completion="y")])
    shapes = "the rows have different columns: messages (rows.jsonl:1); prompt, completion (rows.jsonl:2)"
    assert caught.value.hint.startswith(shapes)
    assert caught.value.hint.endswith("data.skip_bad_rows: 1 would leave them out")


def test_bad_rows_are_left_out_where_the_recipe_allows_it() -> None:
    rows = [row(n, prompt="a", completion="b" if n % 2 else "") for n in range(1, 7)]
    bad, told = BadRows(3), Told()
    report.configure(sink=told)
    assert len(to_conversations(rows, bad=bad).conversations) == 3
    assert [problem.line for problem in bad.skipped] == [2, 4, 6]
    assert ("warning", "left out: rows.jsonl:2: completion: is empty (3 times; also 4, 6)") in told.texts
    with pytest.raises(DataError, match=r"3 of 6 rows cannot be used; data.skip_bad_rows allows 2"):
        to_conversations(rows, bad=BadRows(2))


@pytest.mark.parametrize(
    ("shape", "message", "hint"),
    [
        (
            Shape("alpaca"),
            "data.format: alpaca does not fit the rows, whose columns are: messages",
            "data.format: messages",
        ),
        (Shape("sharegpt"), "data.format: sharegpt does not fit the rows", "data.format: messages"),
        (Shape("text"), "data.format: text does not fit the rows", "data.format: messages"),
        (
            Shape(columns={"messages": "mesages"}),
            "data.columns.messages: no row has a column 'mesages'; did you mean messages?",
            "the columns are: messages",
        ),
    ],
)
def test_a_setting_that_the_rows_contradict(shape: Shape, message: str, hint: str) -> None:
    """One line with the right setting, not one a row."""
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        to_conversations([row(messages=[USER, ANSWER]), row(2, messages=[USER, ANSWER])], shape)
    assert hint in caught.value.hint
    assert caught.value.problems == ()


def test_columns_inside_of_others() -> None:
    """E8: a path names what stands inside; what stands beside it is listed by its own path."""
    task = row(data={"q": "Hi", "id": 3}, annotations=[{"result": [{"text": ["Hello."]}]}], note="n")
    shape = Shape(
        columns={"prompt": "data.q", "completion": "annotations.0.result.0.text.0"}, ignore=("Note",)
    )
    reading = to_conversations([task], shape)
    assert reading.conversations[0].messages() == [USER, ANSWER]
    assert reading.notes.unused == {"data.id": 1}
    packed = row(data=json.dumps({"q": "Hi"}), answer="Hello.")
    reading = to_conversations([packed], Shape(columns={"prompt": "data.q", "completion": "answer"}))
    assert reading.conversations[0].messages() == [USER, ANSWER]
    dotted = Row({"in.put": "Hi", "out.put": "Hello."}, "rows.jsonl", 1)
    reading = to_conversations([dotted], Shape(columns={"prompt": "in.put", "completion": "out.put"}))
    assert reading.conversations[0].messages() == [USER, ANSWER]


def test_messages_beside_others_in_one_column() -> None:
    """Pitfall 51: what stands beside messages in a column that the recipe names is not left out unheard."""
    shape = Shape(columns={"messages": "log"})
    with pytest.raises(DataError) as caught:
        to_conversations([row(log={"system": "Be kind.", "messages": [USER, ANSWER]})], shape)
    assert caught.value.problems[0].message.endswith("beside its messages; name the column log.messages")


def test_odd_calls_are_noted() -> None:
    """Pitfall 51: a template writes them all the same."""
    called: list[dict[str, Json]] = [{"id": number, "name": "look", "arguments": {}} for number in ("1", "2")]
    answers = [{"role": "tool", "content": "x", "tool_call_id": number} for number in ("2", "1")]
    turns = [USER, {"role": "assistant", "tool_calls": called}, *answers, ANSWER]
    look, other = [{"name": "look"}], [{"name": "find"}]
    order = "answers of tools in another order than their calls, whose ids most templates do not write"
    for row_of, notes in (
        (row(messages=turns, tools=look), {order}),
        (row(messages=[*turns[:2], *answers[::-1], ANSWER], tools=look), set()),
        (
            row(messages=turns[:2], tools=other),
            {"calls of a function that the row's tools do not list: look"},
        ),
        (
            row(messages=turns[:2]),
            {"calls of a row without tools: a server's model is shown what it may call"},
        ),
        (row(messages=[USER, answers[0], ANSWER]), {"an answer of a tool that nothing called"}),
    ):
        reading = to_conversations([row_of])
        assert reading.conversations
        assert set(reading.notes.counts) == notes


def test_files_of_two_shapes_in_one() -> None:
    """E2: of columns that could each be the prompt no row has two, so each row says which it is."""
    rows = [row(1, instruction="Hi", output="Hello."), row(2, question="Hi", answer="Hello.")]
    reading = to_conversations(rows)
    assert [made.messages() for made in reading.conversations] == [[USER, ANSWER]] * 2
    with pytest.raises(DataError, match="both instruction and question could be the prompt"):
        to_conversations([*rows, row(3, instruction="Hi", question="Hi", output="Hello.")])


def test_formats_are_told_apart_or_refused() -> None:
    both = to_conversations([row(messages=[USER, ANSWER], prompt="x", completion="y")])
    assert both.format == "messages"
    assert both.notes.unused == {"prompt": 1, "completion": 1}
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: cannot tell the data's format from its columns: a, b"
    ):
        to_conversations([row(a=1, b=2)])
    with pytest.raises(DataError, match="both answer and solution could be the completion"):
        to_conversations([row(problem="x", answer="y", solution="z")])
    with pytest.raises(DataError, match="cannot tell") as caught:
        to_conversations([row(text="good", label="pos")])
    assert caught.value.hint.startswith("to learn the label: data.columns: {prompt: text, completion: label}")


def test_a_reader_of_ones_own() -> None:
    """E4: a function makes of a row what forge then reads as any other."""
    made: dict[int, object] = {1: [USER, ANSWER], 2: {"question": "Hi", "answer": "Hello."}, 3: None}
    rows = [row(n, number=n) for n in made]
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        to_conversations(rows[:2], Shape(reader=lambda values: made[values["number"]]))
    reading = to_conversations([rows[0], rows[2]], Shape(reader=lambda values: made[values["number"]]))
    assert [one.messages() for one in reading.conversations] == [[USER, ANSWER]]
    assert reading.notes.counts == {"left out by the reader that data.format names": 1}
    with pytest.raises(DataError) as caught:
        to_conversations(rows[:1], Shape(reader=lambda values: 5))
    assert "data.format returned int, not messages, a row, a text or None" in str(caught.value.problems[0])


def conversations(count: int, *, copies: int = 1) -> list[Conversation]:
    rows = [row(n, prompt=f"question {n % (count // copies)}", completion="x") for n in range(count)]
    return list(to_conversations(rows).conversations)


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
    assert not {one.fingerprint for one in training} & {one.fingerprint for one in heldout}
    assert 20 <= len(heldout) < 24
    refuse_overlap(training, heldout)


def test_the_split_depends_on_text_and_seed_alone() -> None:
    rows = conversations(60)
    held = {one.fingerprint for one in split(rows, 6, 42)[1]}
    assert held == {one.fingerprint for one in split(rows[::-1], 6, 42)[1]}
    assert held != {one.fingerprint for one in split(rows, 6, 43)[1]}
    more = list(to_conversations([row(99, prompt="a new row", completion="x")]).conversations)
    assert len(held & {one.fingerprint for one in split(rows + more, 6, 42)[1]}) >= 5


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
    assert [str(problem) for problem in caught.value.problems] == [
        "rows.jsonl:3: this held-out row is also a training row (2 times; also 4)"
    ]


def test_pairs_beside_the_chosen_conversation() -> None:
    """UltraFeedback's rows have the chosen answer twice; trl's DPOTrainer reads the pair."""
    chosen, rejected = [USER, ANSWER], [USER, {**ANSWER, "content": "No."}]
    values: dict[str, Any] = {"prompt": "Hi", "messages": chosen, "chosen": chosen, "rejected": rejected}
    reading = to_conversations([row(**values)], Shape(pairs=True))
    assert reading.format == "preference"
    assert reading.conversations[0].rejected[-1].content == "No."
    assert to_conversations([row(**values)]).format == "messages"
