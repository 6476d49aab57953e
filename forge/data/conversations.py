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
from forge.data.called import note_calls
from forge.data.columns import left_out, refuse_beside, refuse_keys, refuse_two_columns, variables_of
from forge.data.conversation import Conversation, Row, Rows, RowsOf, Turn
from forge.data.dialogue import chat_turns, is_chat, of_text, with_functions
from forge.data.exchange import exchange, filled, think
from forge.data.exports import plain_row
from forge.data.layout import (
    AUTO,
    EMPTY,
    MESSAGES,
    SHAREGPT,
    TEXT,
    Layout,
    Reader,
    Shape,
    in_short,
    layout_of,
)
from forge.data.paths import with_paths
from forge.data.problems import BadRows
from forge.data.texts import TOO_DEEP, BadRowError, Notes, text_of, writable
from forge.data.turns import finished, tools_of, turns_of
from forge.data.unclear import refuse_unclear
from forge.errors import DataError, Problem

LABELLED = "answers labelled"
"""What the notes of such rows begin with."""


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
    refuse_unclear(next(iter(rows)), shape)
    whole, paths = rows, [name for name in (*shape.columns.values(), *shape.ignore) if "." in name]
    rows = RowsOf(len(whole), lambda: (_plain(row, paths) for row in whole))
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


def _plain(row: Row, paths: Sequence[str]) -> Row:
    """A row that a service exports, as a row of messages; with the columns that are named by these paths."""
    values = with_paths(plain_row(row.values), paths)
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
    variables = variables_of(row, layout)
    turns = list(_system(row, layout))
    if layout.format == TEXT:
        place, value = layout.value(row, fields.TEXT)
        made = of_text(text_of(filled(value, row, place), place), place, row.place, notes, turns)
        for part, has_some in ((fields.SYSTEM, turns), (fields.TOOLS, tools)):
            if has_some and not made.turns:
                column, _ = layout.value(row, part)
                raise BadRowError(
                    f"stands beside a text, which is learned as it is; data.ignore: [{column}] leaves it out "
                    "of account",
                    column,
                )
        if variables and not made.turns:
            notes.unused[writable(variables.column)] += 1
        return replace(made, tools=tools, variables=variables if made.turns else None)
    if layout.format in (MESSAGES, SHAREGPT):
        column, value = layout.value(row, fields.MESSAGES)
        value = filled(value, row, column)
        if is_chat(value):
            notes.counts["texts of USER: and ASSISTANT:, read as conversations"] += 1
            turns, functions = with_functions(turns, column)
            tools = tools or functions
            turns += chat_turns(value, column)
        else:
            turns += turns_of(value, column, shape.roles, notes)
        think(turns, row, layout, notes)
    else:
        turns += exchange(row, layout, shape, notes)
    refuse_beside(row, layout, shape, turns)
    done = finished(turns, notes)
    rejected: tuple[Turn, ...] = ()
    if shape.pairs:
        asked = exchange(row, layout, shape, Notes(), part=fields.REJECTED)
        rejected = finished([*_system(row, layout), *asked], Notes())
        _refuse_no_pair(done, rejected, layout)
    _refuse_tools_twice(row, layout, done, tools)
    note_calls(done, tools, notes)
    if all(turn.trained is False for turn in done if turn.role == "assistant"):
        notes.counts["left out: no answer carries loss, says the row"] += 1
        return None
    desirable = _judged(row, layout, notes) if shape.labels else None
    return Conversation(done, row.place, tools, rejected=rejected, desirable=desirable, variables=variables)


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
