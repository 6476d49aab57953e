"""Rows to conversations, whatever shape they have: which column plays which part, then the turns.

Every row becomes a conversation, is left out because it says so itself, or is named as a problem; every
column is used, refused by name, or listed as unused. Not covered: the files (`files`), templates (`tokens`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from forge.codec import Json
from forge.data import fields
from forge.data.columns import left_out, refuse_beside, refuse_keys, refuse_two_columns
from forge.data.conversation import Conversation, Row, Rows, RowsOf, Turn
from forge.data.dialogue import chat_turns, dialogue, is_chat, of_text, with_functions
from forge.data.exports import plain_row
from forge.data.layout import (
    AUTO,
    EMPTY,
    MESSAGES,
    PREFERENCE,
    SHAREGPT,
    TEXT,
    Layout,
    Reader,
    Shape,
    in_short,
    layout_of,
)
from forge.data.problems import BadRows
from forge.data.texts import TOO_DEEP, BadRowError, Notes, is_of_parts, parsed, text_of, writable, written
from forge.data.turns import calls_of, finished, tools_of, turns_of
from forge.errors import DataError, Problem

LABELLED, PAIRS = "answers labelled", "preference pairs"
"""What the notes of such rows begin with."""
# What programs write into a cell that holds nothing.
_BLANKS = ("nan", "null", "none", "n/a", "#n/a", "undefined", "<noinput>")
# A column `reasoning` that holds one of these says how the row was made, not what was thought.
_SWITCHES = ("on", "off", "low", "medium", "high", "none", "true", "false", "yes", "no")


@dataclass(frozen=True)
class Reading:
    """Some rows, understood: going through it makes their conversations, and notes what was done to them.

    It raises one `DataError` at the end, with every row that cannot be one, where they are more than `bad`
    allows.
    """

    rows: Rows
    layout: Layout
    shape: Shape
    notes: Notes
    bad: BadRows
    failed: Sequence[Problem] = ()
    """Rows that the reader of `data.format` refused."""

    @property
    def format(self) -> str:
        return self.layout.format

    @property
    def why(self) -> str:
        used = {part: columns[0] for part, columns in self.layout.parts.items() if columns}
        why = ", ".join(
            column if part == fields.plain(column) else f"{column} as {part}" for part, column in used.items()
        )
        return why + (", from the reader that data.format names" if self.shape.reader is not None else "")

    @functools.cached_property
    def conversations(self) -> tuple[Conversation, ...]:
        return tuple(self)

    def __iter__(self) -> Iterator[Conversation]:
        problems, is_any = list(self.failed), False
        for row in self.rows:
            try:
                conversation = _conversation(row, self.layout, self.shape, self.notes)
            except BadRowError as wrong:
                problems.append(row.problem(wrong.message, wrong.field))
                continue
            except RecursionError:
                problems.append(row.problem(TOO_DEEP))
                continue
            if conversation is not None:
                is_any = True
                yield conversation
        if problems:
            count = len(self.rows) + len(self.failed)
            self.bad.settle(
                problems, f"{len(problems)} of {count} rows cannot be used", _columns_hint(self.rows)
            )
        if not is_any:
            raise DataError(
                "no row is left to learn from", hint="the rows' own weight, train or label leave all out"
            )


def understand(rows: Rows, shape: Shape | None = None, bad: BadRows | None = None) -> Reading:
    """Which parts the columns of the rows play; raises `DataError` where that is not clear."""
    shape, bad, notes = shape or Shape(), bad or BadRows(), Notes()
    problems: list[Problem] = []
    if shape.reader is not None:
        count = len(rows)
        rows = list(_read_by(shape.reader, rows, notes, problems))
        shape = replace(shape, format=AUTO)
        if not rows:
            bad.settle(problems, f"{len(problems)} of {count} rows cannot be used", "look at data.format")
            raise DataError("no row is left to learn from", hint="look at what data.format makes of the rows")
    whole = rows
    rows = RowsOf(len(whole), lambda: map(_plain, whole))
    layout = layout_of(rows, shape)
    has_pairs = bool(layout.parts.get(fields.REJECTED))
    has_labels = shape.labels and bool(layout.parts.get(fields.LABEL)) and not has_pairs
    if shape.pairs and not has_pairs and not has_labels:
        labelled = ", and no label" if shape.labels else ""
        or_labelled = ", or of prompt, completion and label" if shape.labels else ""
        raise DataError(
            f"the rows ({layout.format}) are no preference pairs: they have no rejected answer{labelled}",
            hint=f"give rows of prompt, chosen and rejected{or_labelled} (data.columns names them), or leave "
            "train.objective out",
        )
    shape = replace(shape, pairs=shape.pairs and has_pairs, labels=has_labels)
    return Reading(rows, layout, shape, notes, bad, problems)


def to_conversations(rows: Rows, shape: Shape | None = None, bad: BadRows | None = None) -> Reading:
    """Every row as a conversation; raises one `DataError` with every row that cannot be one.

    `bad` says how many may be left out instead.
    """
    reading = understand(rows, shape, bad)
    reading.conversations  # noqa: B018 - what is wrong with a row is raised here
    return reading


def _plain(row: Row) -> Row:
    """A row that a service exports, as a row of messages."""
    values = plain_row(row.values)
    return row if values is row.values else replace(row, values=values)


def _columns_hint(rows: Rows) -> str:
    """The columns; where rows have different ones, which and where."""
    sets: dict[tuple[str, ...], Row] = {}
    for row in rows:
        sets.setdefault(tuple(key for key, value in row.values.items() if value not in EMPTY), row)
    shown = [f"{in_short(keys) or 'none'} ({row.file}:{row.line})" for keys, row in list(sets.items())[:4]]
    if len(sets) < 2:
        return f"the columns are: {in_short(list(map(str, next(iter(rows)).values)))}"
    return f"the rows have different columns: {'; '.join(shown)}: make it one shape, or a source for each"


def _read_by(reader: Reader, rows: Rows, notes: Notes, problems: list[Problem]) -> Iterator[Row]:
    for row in rows:
        try:
            made = reader(row.values)
        except DataError as error:
            problems.append(row.problem(error.message))
            continue
        if made is None:
            notes.counts["left out by the reader that data.format names"] += 1
        elif isinstance(made, Mapping):
            yield replace(row, values=made)
        elif isinstance(made, str):
            yield replace(row, values={"text": made})
        elif isinstance(made, (list, tuple)):
            yield replace(row, values={"messages": list(made)})
        else:
            problems.append(
                row.problem(
                    f"data.format returned {type(made).__name__}, not messages, a row, a text or None"
                )
            )


def _conversation(row: Row, layout: Layout, shape: Shape, notes: Notes) -> Conversation | None:
    """The row's conversation; None for a row that says itself that it is not to be learned."""
    refuse_keys(row, layout, shape, notes)
    refuse_two_columns(row, layout, notes)
    if (why := left_out(row, layout, notes, labels=shape.labels)) is not None:
        notes.counts[f"left out: {why}"] += 1
        return None
    column, value = layout.value(row, fields.TOOLS)
    tools = tools_of(value, column)
    turns = list(_system(row, layout))
    if layout.format == TEXT:
        place, value = layout.value(row, fields.TEXT)
        made = of_text(text_of(_said(value, row, place), place), place, row.place, notes, turns)
        for part, has_some in ((fields.SYSTEM, turns), (fields.TOOLS, tools)):
            if has_some and not made.turns:
                column, _ = layout.value(row, part)
                raise BadRowError(
                    f"stands beside a text, which is learned as it is; data.ignore: [{column}] leaves it out "
                    "of account",
                    column,
                )
        return replace(made, tools=tools)
    if layout.format in (MESSAGES, SHAREGPT):
        column, value = layout.value(row, fields.MESSAGES)
        value = _said(value, row, column)
        if is_chat(value):
            notes.counts["texts of USER: and ASSISTANT:, read as conversations"] += 1
            turns, functions = with_functions(turns, column)
            tools = tools or functions
            turns += chat_turns(value, column)
        else:
            turns += turns_of(value, column, shape.roles, notes)
        _think(turns, row, layout, notes)
    else:
        turns += _exchange(row, layout, shape, notes)
    refuse_beside(row, layout, shape, turns)
    done = finished(turns, notes)
    rejected: tuple[Turn, ...] = ()
    if shape.pairs:
        asked = _exchange(row, layout, shape, Notes(), part=fields.REJECTED)
        rejected = finished([*_system(row, layout), *asked], Notes())
        _refuse_no_pair(done, rejected, layout)
    _refuse_tools_twice(row, layout, done, tools)
    if all(turn.trained is False for turn in done if turn.role == "assistant"):
        notes.counts["left out: no answer carries loss, says the row"] += 1
        return None
    desirable = _judged(row, layout, notes) if shape.labels else None
    return Conversation(done, row.place, tools, rejected=rejected, desirable=desirable)


def _refuse_tools_twice(
    row: Row, layout: Layout, turns: Sequence[Turn], tools: Sequence[Mapping[str, Json]]
) -> None:
    """A system prompt that lists the row's tools would have them twice, once from the template."""
    if tools and turns[0].role == "system" and "<tools>" in turns[0].content:
        column, _ = layout.value(row, fields.TOOLS)
        raise BadRowError(
            f"stand in the system prompt too (<tools>), and the template writes them there; data.ignore: "
            f"[{column}] leaves the column out of account",
            column,
        )


def _judged(row: Row, layout: Layout, notes: Notes) -> bool:
    """Whether the row's answer is good."""
    column, value = layout.value(row, fields.LABEL)
    good = fields.switch(value)
    if good is None:
        raise BadRowError(f"is {value!r}; it must say whether the answer is good: true or false", column)
    notes.counts[f"{LABELLED} {'good' if good else 'bad'}"] += 1
    return good


def _refuse_no_pair(chosen: Sequence[Turn], rejected: Sequence[Turn], layout: Layout) -> None:
    """Two answers to one prompt can be compared, two conversations cannot."""
    column = layout.parts[fields.REJECTED][0]
    if chosen == rejected:
        raise BadRowError("is the chosen answer too", column)
    if chosen[:-1] != rejected[:-1]:
        raise BadRowError("answers another conversation than the chosen answer", column)


def _system(row: Row, layout: Layout) -> Iterator[Turn]:
    column, value = layout.value(row, fields.SYSTEM)
    if value in EMPTY:
        return
    if isinstance(value, Mapping) and "parts" in value:
        value = value["parts"]
    text = text_of(value, column, empty_ok=True)
    if text.strip():
        yield Turn("system", text)


def _exchange(
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
        answer = "" if calls and answer is None else written(_said(answer, row, place), place, notes)
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
    words = _said(prompt, row, asked)
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


def _think(turns: list[Turn], row: Row, layout: Layout, notes: Notes) -> None:
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


def _said(value: object, row: Row, column: str) -> object:
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
