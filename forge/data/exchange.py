"""Rows that hold a question and an answer, in columns of their own: to turns.

With what stands before and between: history, input, thinking. Not covered: lists of messages (`turns`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from forge.data import fields
from forge.data.conversation import Row, Turn
from forge.data.dialogue import dialogue
from forge.data.layout import EMPTY, PREFERENCE, Layout, Shape
from forge.data.texts import BadRowError, Notes, is_of_parts, parsed, text_of, writable, written
from forge.data.turns import calls_of, turns_of

PAIRS = "preference pairs"
"""What the notes of such rows begin with."""
# What programs write into a cell that holds nothing.
_BLANKS = ("nan", "null", "none", "n/a", "#n/a", "undefined", "<noinput>")
# A column `reasoning` that holds one of these says how the row was made, not what was thought.
_SWITCHES = ("on", "off", "low", "medium", "high", "none", "true", "false", "yes", "no")


def exchange(
    row: Row, layout: Layout, shape: Shape, notes: Notes, *, part: str = fields.CHOSEN
) -> Iterator[Turn]:
    """Prompt and answer, with what stands before and between: history, input, thinking.

    Of a preference pair it is the answer that plays this `part`, the chosen or the rejected one.
    """
    place, answer = layout.value(row, part if layout.format == PREFERENCE else fields.COMPLETION)
    asked, prompt = layout.value(row, fields.PROMPT)
    if layout.format == PREFERENCE:
        used = (
            "both answers are compared"
            if shape.pairs
            else ("the chosen answer is learned, the rejected one is not used")
        )
        notes.counts[f"{PAIRS}: {used}"] += 1
        if isinstance(answer, str) and prompt in EMPTY:
            yield from dialogue(answer, place)
            return
    answer = _listed(answer)
    prompt = _listed(prompt)
    if isinstance(answer, list) and answer and isinstance(answer[0], Mapping) and not is_of_parts(answer):
        reply = list(turns_of(answer, place, shape.roles, notes))
        if reply[0].role != "assistant" and layout.format == PREFERENCE:
            is_listed = _is_messages(prompt)
            before = list(turns_of(prompt, asked, shape.roles, Notes())) if is_listed else []
            if not {turn.content for turn in before} <= {turn.content for turn in reply}:
                raise BadRowError(f"has turns that {place} has not; put them into both answers' turns", asked)
            yield from reply  # the whole conversation, its prompt included
            return
    else:
        place_of_thought, reasoning = _reasoning(row, layout, notes)
        if reasoning and shape.pairs:
            raise BadRowError(
                "stands beside two answers; put it into the messages of its own", place_of_thought
            )
        made, listed = layout.value(row, fields.CALLS)
        if fields.plain(made) == "answers" and not _are_calls(listed):
            raise BadRowError(
                "may hold several answers, and a row learns one; data.format: module:function chooses it",
                made,
            )
        calls = calls_of(listed, made)
        answer = "" if calls and answer is None else written(filled(answer, row, place), place, notes)
        text = text_of(answer, place, empty_ok=bool(calls))
        reply = [Turn("assistant", text, reasoning=reasoning, tool_calls=calls)]
    beside, more = layout.value(row, fields.INPUT)
    if isinstance(prompt, str) and _is_messages(more):  # OpenAI's responses: instructions and input
        yield Turn("system", text_of(prompt, asked, empty_ok=True))
        prompt, asked, more = more, beside, None
    for column, value in ((asked, prompt), (beside, more), (place, answer)):
        if isinstance(value, str) and len(value) < 20 and (word := value.strip()).lower() in _BLANKS:
            notes.counts[f"{column} says only {word}, learned as a word: an empty cell of a table?"] += 1
    yield from _history(row, layout, shape, notes)
    extra = text_of(more, beside, empty_ok=True) if more is not None else ""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping) and not is_of_parts(prompt):
        if extra.strip():
            raise BadRowError(f"stands beside a {asked} that is a list of messages", beside)
        before = list(turns_of(prompt, asked, shape.roles, notes))
        if before[-1].role == reply[0].role == "assistant":
            last = before.pop()
            if last.as_message() != reply[0].as_message():
                raise BadRowError(f"ends with another answer than {place}; keep the one to learn", asked)
        yield from before
    else:
        yield from _question(prompt, extra, row, asked, notes)
    yield from reply


def _question(prompt: object, extra: str, row: Row, asked: str, notes: Notes) -> Iterator[Turn]:
    """What the user says: the prompt as a text, and what stands beside it."""
    words = filled(prompt, row, asked)
    if not isinstance(words, Mapping):
        words = written(words, asked, notes)
    question = text_of(words, asked, empty_ok=bool(extra.strip()))
    marks = [mark for mark in fields.TEMPLATE_MARKS if mark in question]
    if question.lstrip().startswith(fields.ALPACA_MARKS):
        marks += [fields.ALPACA_MARKS[0]]
    if marks:
        raise BadRowError(
            f"has {marks[0]}, a chat template's mark: it is rendered already; give the user's words, "
            "the template is the base's",
            asked,
        )
    if question.lstrip().startswith("Human:") and question.rstrip().endswith("\nAssistant:"):
        notes.counts["prompts of Human: and Assistant:, read as conversations"] += 1
        yield from dialogue(question.rstrip().removesuffix("Assistant:"), asked)
    else:
        yield Turn("user", "\n\n".join(text for text in (question, extra) if text.strip()))


def _are_calls(value: object) -> bool:
    """Whether a column `answers` holds calls, as xLAM's does."""
    value = parsed(value)
    return value in EMPTY or (
        isinstance(value, list)
        and all(isinstance(call, Mapping) and {"name", "function"} & call.keys() for call in value)
    )


def _reasoning(row: Row, layout: Layout, notes: Notes) -> tuple[str, str]:
    """The column that holds the thinking before the answer, and the thinking."""
    column, value = layout.value(row, fields.REASONING)
    if value in EMPTY:
        return column, ""
    if isinstance(value, str) and fields.plain(value) in _SWITCHES:
        notes.unused[writable(column)] += 1
        value = None
    return column, text_of(value, column, empty_ok=True)


def think(turns: list[Turn], row: Row, layout: Layout, notes: Notes) -> None:
    """Put the thinking that stands beside a conversation before its last answer, which has none."""
    column, reasoning = _reasoning(row, layout, notes)
    if not reasoning.strip():
        return
    last = max((at for at, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is None:
        return
    if any(reasoning.strip() in turn.content or reasoning == turn.reasoning for turn in turns):
        notes.unused[writable(column)] += 1  # it is there already
    elif turns[last].reasoning or "<think>" in turns[last].content:
        raise BadRowError("stands beside an answer that has its own thinking", column)
    else:
        turns[last] = replace(turns[last], reasoning=reasoning)


def filled(value: object, row: Row, column: str) -> object:
    """The value of a column that a row cannot be read without; raises `BadRowError` where it has none."""
    if column not in row.values:
        raise BadRowError("there is no such column", column)
    if value is None:
        raise BadRowError("is null", column)
    if isinstance(value, BadRowError):  # why a row of an export has no messages
        raise value
    return value


def _listed(value: object) -> object:
    """A list of messages that stands as a text; any other text, JSON or not, is what it is."""
    made = parsed(value)
    is_messages = isinstance(made, list) and made and isinstance(made[0], Mapping) and "role" in made[0]
    if isinstance(made, Mapping) and isinstance(value, Mapping) and {"role", "from"} & value.keys():
        return [made]
    return made if is_messages else value


def _is_messages(value: object) -> bool:
    value = parsed(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, Mapping) and any(fields.message_part(key) == fields.ROLE for key in item)
            for item in value
        )
    )


def _history(row: Row, layout: Layout, shape: Shape, notes: Notes) -> Iterator[Turn]:
    """Alpaca's earlier exchanges: [[question, answer], ...], or messages; they carry loss as others do."""
    column, value = layout.value(row, fields.HISTORY)
    value = parsed(value)
    if value in EMPTY:
        return
    is_flat = isinstance(value, list) and len(value) % 2 == 0 and all(isinstance(v, str) for v in value)
    if is_flat or (isinstance(value, list) and all(isinstance(item, Mapping) for item in value)):
        yield from turns_of(value, column, shape.roles, notes)
        return
    if not isinstance(value, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value
    ):
        raise BadRowError("is not a list of [question, answer]", column)
    for number, (question, answer) in enumerate(value):
        yield Turn("user", text_of(question, f"{column}[{number}][0]"))
        yield Turn("assistant", text_of(answer, f"{column}[{number}][1]"))
