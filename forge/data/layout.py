"""Which column of some rows plays which part, and so which format the rows have.

What the recipe says counts first, then the usual names (`fields`). What could be two things, and a setting
that the rows contradict, is one `DataError` with the setting that is right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from forge import report
from forge.data import fields
from forge.data.conversation import Row, Rows
from forge.data.paths import texts_inside
from forge.data.texts import parsed
from forge.errors import DataError

Reader = Callable[[Mapping[str, Any]], object]
"""A reader of one's own: a row's values to messages, to a row of a known shape, to a text, or None."""

AUTO, MESSAGES, SHAREGPT, PROMPT, PREFERENCE, TEXT = (
    "auto",
    "messages",
    "sharegpt",
    "prompt",
    "preference",
    "text",
)
# A format -> the columns of prompt, input and completion that go by this name.
_PAIRS: Mapping[str, tuple[str, str, str]] = {
    PROMPT: ("prompt", "", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "question": ("question", "context", "answer"),
}
_MOST_NAMES, _LONGEST_NAME = 30, 30
# A sign between two names of columns that are known.
_ELSE_BETWEEN = re.compile(r"^\w+ ?([^\w .-]) ?\w+$")
EMPTY: tuple[object, ...] = (None, "", [], {}, ())


@dataclass(frozen=True)
class Shape:
    """What a recipe says of its rows."""

    format: str = AUTO
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    reader: Reader | None = None
    pairs: bool = False
    """Whether the rejected answer of a preference pair is read too."""
    labels: bool = False
    """Whether single answers with a label, good or bad, are read too."""

    def ignores(self, column: str) -> bool:
        return fields.plain(column) in map(fields.plain, self.ignore)


@dataclass(frozen=True)
class Layout:
    """Which columns play which part, the preferred first."""

    format: str
    parts: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        return [*dict.fromkeys([key for keys in self.parts.values() for key in keys]), *self.unused]

    def value(self, row: Row, part: str) -> tuple[str, Any]:
        """The column of `part` and what it holds: the first that is not empty."""
        columns = self.parts.get(part, ())
        for column in columns:
            if row.values.get(column) not in EMPTY:
                return column, row.values[column]
        return (columns[0], row.values.get(columns[0])) if columns else (part, None)


def _columns_of(rows: Rows) -> dict[str, int]:
    """Every column of the rows -> in how many it holds something."""
    counts: Counter[str] = Counter()
    for row in report.track("look at the columns", rows, len(rows)):
        for key, value in row.values.items():
            counts[key] += value not in EMPTY
    return dict(counts)


def in_short(columns: Sequence[str]) -> str:
    """Names of columns; of a table without a header they may be its first row, of an object its rows."""
    shown = [name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in columns]
    return ", ".join(shown[:_MOST_NAMES]) + f" and {len(shown) - _MOST_NAMES} more" * (
        len(shown) > _MOST_NAMES
    )


def _require_columns(there: Sequence[str], shape: Shape) -> None:
    for part, column in shape.columns.items():
        if column not in there:
            near = get_close_matches(column, there, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise DataError(
                f"data.columns.{part}: no row has a column {column!r}{meant}",
                hint=f"the columns are: {in_short(there)}",
            )


def layout_of(rows: Rows, shape: Shape) -> Layout:
    """What the columns of all rows are for; raises `DataError` where that is not clear."""
    counts = _columns_of(rows)
    _require_columns(sorted(counts), shape)
    first = next(iter(rows))
    where = f"{first.file}:{first.line}"
    columns = [key for key in counts if not shape.ignores(key)]
    taken = set(shape.columns.values())
    parts: dict[str, list[str]] = {part: [column] for part, column in shape.columns.items()}
    for part, names in fields.ROW_FIELDS.items():
        if part not in parts:
            fitting = [key for key in columns if fields.plain(key) in names and key not in taken]
            if part == fields.MESSAGES:  # `turns` may be their number
                fitting = [key for key in fitting if not isinstance(first.values.get(key), (int, float))]
            if part == fields.TOOLS and len(fitting) > 1:  # Gemini's says whether they must be called
                fitting = [key for key in fitting if fields.plain(key) != "toolconfig"]
            fitting.sort(key=lambda key: names.index(fields.plain(key)))
            # A column that holds nothing in any row is no candidate where another one is.
            parts[part] = [key for key in fitting if counts[key]] or fitting
    if _asks_only(rows, parts):
        # The conversation up to the question, and the answer in a column of its own.
        parts[fields.PROMPT], parts[fields.MESSAGES] = parts[fields.MESSAGES], []
    form = shape.format if shape.format != AUTO else _detect(parts, shape, columns, rows)
    _require_format(form, parts, shape, columns, rows)
    apart = {part for part, keys in parts.items() if _are_apart(rows, counts, keys)}
    chosen = {
        part: tuple(keys) for part, keys in _of_format(form, parts, shape, where, apart).items() if keys
    }
    if form in (MESSAGES, SHAREGPT):
        form = _spelling(rows, chosen[fields.MESSAGES], form)
    elif form == PROMPT:
        form = _named(chosen)
    if form not in (TEXT, PREFERENCE) and not any(counts[key] for key in chosen.get(fields.REASONING, ())):
        thinking = _thinking_of(chosen.get(fields.COMPLETION, ("",))[0], columns)
        chosen |= {fields.REASONING: thinking} if thinking else {}
    used = {key for keys in chosen.values() for key in keys}
    if idle := [part for part, column in shape.columns.items() if column not in used]:
        raise DataError(
            f"data.columns.{idle[0]}: rows of the format {form} have no {idle[0]}",
            hint=f"leave it out; they have: {', '.join(chosen)}",
        )
    return Layout(form, chosen, tuple(key for key in counts if key not in used))


def _thinking_of(answer: str, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that say by their names that they are the thinking before the answer in this column."""
    whose = fields.answerer(answer)
    return tuple(key for key in columns if whose and fields.thinker(key) == whose)


def _asks_only(rows: Rows, parts: Mapping[str, Sequence[str]]) -> bool:
    """Whether messages end with a question, and a column beside them has the answer."""
    answers = [*parts[fields.CHOSEN], *parts[fields.COMPLETION]]
    for row in rows if answers and parts[fields.MESSAGES] else ():
        turns = next(
            (parsed(row.values.get(key)) for key in parts[fields.MESSAGES] if row.values.get(key)), None
        )
        if isinstance(turns, list) and turns and any(row.values.get(key) not in EMPTY for key in answers):
            return _speaker(turns[-1]) in ("user", "system", "tool")
    return False


def _speaker(values: object) -> str | None:
    """Who says a message, by the usual names."""
    if not isinstance(values, Mapping):
        return None
    name = next((values[key] for key in values if fields.message_part(key) == fields.ROLE), None)
    return fields.role_of(name, {}) if isinstance(name, str) else None


def _may_be_turns(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(item, str) or _speaker(item) for item in value)
    )


def _refuse_single_messages(rows: Rows, columns: Sequence[str]) -> None:
    """Rows that are a message each: their order, or a tree of parents, is the conversation."""
    first = next(iter(rows))
    values = {key: first.values.get(key) for key in columns}
    if _speaker(values):
        raise DataError(
            f"{first.file}:{first.line}: each row is a single message, not a conversation; its columns "
            f"are: {in_short(columns)}",
            hint="put a conversation into one row: {messages: [{role: ..., content: ...}, ...]}"
            + ("; OpenAssistant's *.trees.jsonl has whole trees" if "message_tree_id" in columns else ""),
        )


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _unknown_turns(columns: Sequence[str], row: Row) -> str:
    """A column that has another name than turns have and may hold some; texts where only it does."""
    lists = {key: value for key in columns if _may_be_turns(value := parsed(row.values.get(key)))}
    spoken = [key for key, value in lists.items() if isinstance(value, list) and _speaker(value[0])]
    texts = (
        []
        if any(map(_is_of_pair, columns))
        else [key for key in lists if fields.plain(key) not in fields.OF_PROMPT]
    )
    return spoken[0] if spoken else texts[0] if len(texts) == 1 else ""


def _near_pair(parts: Mapping[str, Sequence[str]], columns: Sequence[str], row: Row) -> str:
    """What to set where a question or an answer is known and the other half has another name."""
    asked = [*parts[fields.PROMPT], *parts[fields.INPUT]]
    if not asked:
        if not (answers := parts[fields.COMPLETION]):
            return ""
        return f"data.columns: {{prompt: ...}} names the question that {answers[0]} answers"
    texts = [key for key in columns if isinstance(row.values.get(key), str) and key not in asked]
    near = [key for key in texts if fields.answerer(key) or key in parts[fields.TEXT]]
    ways = [f"data.columns: {{prompt: {asked[0]}, completion: {key}}} learns {key}" for key in near[:3]]
    ways = ways or [f"data.columns: {{prompt: {asked[0]}, completion: ...}} names the answer"]
    return "; ".join([*ways, "data.format: module:function reads any other row"])


def _is_of_pair(column: str) -> bool:
    return fields.plain(column).removesuffix("s") in _OF_PAIRS


_OF_PAIRS = (*fields.ROW_FIELDS[fields.PROMPT], *fields.ROW_FIELDS[fields.COMPLETION])


def _detect(parts: Mapping[str, Sequence[str]], shape: Shape, columns: Sequence[str], rows: Rows) -> str:
    """The format that the columns of these parts make."""
    first = next(iter(rows))
    where = f"{first.file}:{first.line}"
    has_answer = (parts[fields.COMPLETION] or parts[fields.CALLS]) and (
        parts[fields.PROMPT] or parts[fields.INPUT]
    )
    asked = shape.columns.keys()
    if fields.TEXT in asked:
        return TEXT
    if {fields.PROMPT, fields.COMPLETION} & asked and has_answer:
        return PROMPT
    if parts[fields.MESSAGES] and not (shape.pairs and parts[fields.CHOSEN]):
        return MESSAGES
    if parts[fields.CHOSEN]:
        return PREFERENCE
    if has_answer:
        return PROMPT
    _refuse_single_messages(rows, columns)
    if (
        parts[fields.TEXT]
        and not parts[fields.LABEL]
        and not any(
            parts[part] for part in (fields.PROMPT, fields.INPUT, fields.COMPLETION, fields.REASONING)
        )
        and not any(fields.plain(key) in fields.OF_ANSWER for key in columns)
    ):
        return TEXT
    hint = (
        "say which is which: data.columns: {prompt: ..., completion: ...} or {messages: ...}; "
        "data.format: module:function reads any other row"
    )
    if parts[fields.TEXT] and parts[fields.LABEL]:
        text, label = parts[fields.TEXT][0], parts[fields.LABEL][0]
        hint = f"to learn the label: data.columns: {{prompt: {text}, completion: {label}}}"
    elif (near := [key for key in columns if fields.plain(key) in fields.OF_ANSWER]) and (
        texts := [*parts[fields.TEXT], *(key for key in columns if fields.plain(key) in fields.OF_PROMPT)]
    ):
        hint = f"data.columns: {{prompt: {texts[0]}, completion: {near[0]}}} learns the {near[0]}"
        if parts[fields.TEXT]:
            hint += f"; data.ignore: [{near[0]}] leaves it out of account"
    elif fields.PROMPT in asked or fields.COMPLETION in asked:
        other = fields.COMPLETION if fields.PROMPT in asked else fields.PROMPT
        hint = f"data.columns: {{{other}: ...}} is missing"
    elif refused := [
        key
        for key in columns
        if fields.plain(key) in fields.ROW_REFUSED
        and (fields.plain(key) != "labels" or _are_numbers(first.values.get(key)))
    ]:
        hint = f"{refused[0]}: {fields.ROW_REFUSED[fields.plain(refused[0])]}"
    elif len(columns) == 1 and (mark := _ELSE_BETWEEN.search(columns[0])):
        hint = f"where {mark[1]!r} parts its columns: write the table with commas, tabs, semicolons or bars"
    elif turns := _unknown_turns(columns, first):
        hint = f"where {turns} has the turns of a conversation: data.columns: {{messages: {turns}}}"
    elif pair := _near_pair(parts, columns, first):
        hint = pair
    elif not columns:
        raise DataError(f"{where}: the rows have no columns", hint="training needs texts or conversations")
    elif inside := texts_inside({key: first.values.get(key) for key in columns}):
        hint = (
            f"data.columns takes what is inside, too, such as {', '.join(inside)}: {{prompt: ..., "
            "completion: ...}; data.format: module:function reads any other row"
        )
    raise DataError(
        f"{where}: cannot tell the data's format from its columns: {in_short(columns)}",
        hint=f"{hint}; a table needs a line of column names first",
    )


def _require_format(
    form: str,
    parts: Mapping[str, Sequence[str]],
    shape: Shape,
    columns: Sequence[str],
    rows: Rows,
) -> None:
    """Refuse a format that the recipe names and the rows contradict, with the setting that is right."""
    if shape.format == AUTO:
        return
    prompt, _, completion = _PAIRS.get(form, ("", "", ""))
    plain = {fields.plain(column) for column in columns}
    mapped = shape.columns.keys()
    fits = {
        MESSAGES: bool(parts[fields.MESSAGES]),
        SHAREGPT: bool(parts[fields.MESSAGES]),
        PREFERENCE: bool(parts[fields.CHOSEN]),
        TEXT: bool(parts[fields.TEXT]),
        PROMPT: bool(
            (parts[fields.COMPLETION] or parts[fields.CALLS])
            and (parts[fields.PROMPT] or parts[fields.INPUT])
        ),
    }.get(
        form,
        (prompt in plain or fields.PROMPT in mapped) and (completion in plain or fields.COMPLETION in mapped),
    )
    if fits and form in (MESSAGES, SHAREGPT):
        spelled = _spelling(rows, tuple(parts[fields.MESSAGES]), form)
        fits, right = spelled == form, spelled
    elif not fits:
        right = _detect(parts, shape, columns, rows)
    if not fits:
        raise DataError(
            f"data.format: {form} does not fit the rows, whose columns are: {in_short(columns)}",
            hint=f"set data.format: {right}, or leave it out",
        )


def _are_apart(rows: Rows, counts: Mapping[str, int], keys: Sequence[str]) -> bool:
    """Whether no row has two of these columns: files of several shapes in one."""
    if len(keys) < 2 or sum(counts[key] for key in keys) > len(rows):
        return False
    return all(sum(row.values.get(key) not in EMPTY for key in keys) < 2 for row in rows)


def _of_format(
    form: str, parts: Mapping[str, Sequence[str]], shape: Shape, where: str, apart: Collection[str]
) -> dict[str, list[str]]:
    """The parts that the format uses; raises `DataError` where two columns could be one.

    Of the parts that are `apart` each row has one column at most.
    """
    always = (fields.SYSTEM, fields.TOOLS, fields.TRAINED, fields.WEIGHT, fields.LABEL, fields.VARIABLES)
    own = {
        MESSAGES: (fields.MESSAGES, fields.REASONING),
        SHAREGPT: (fields.MESSAGES, fields.REASONING),
        TEXT: (fields.TEXT,),
        PREFERENCE: (fields.PROMPT, fields.INPUT, fields.HISTORY, fields.CHOSEN, fields.REJECTED),
    }.get(
        form,
        (fields.PROMPT, fields.INPUT, fields.HISTORY, fields.COMPLETION, fields.CALLS, fields.REASONING),
    )
    chosen = {part: list(parts[part]) for part in (*own, *always) if parts[part]}
    if fields.COMPLETION in chosen:  # `answers` beside an answer are others that are right
        chosen[fields.CALLS] = [key for key in chosen.get(fields.CALLS, ()) if fields.plain(key) != "answers"]
    pair = _PAIRS.get(form)
    named_parts = dict(zip((fields.PROMPT, fields.INPUT, fields.COMPLETION), pair or (), strict=False))
    is_whole = all(
        part in shape.columns or named_parts.get(part, "") in map(fields.plain, chosen.get(part, ()))
        for part in (fields.PROMPT, fields.COMPLETION)
    )
    for part, named in named_parts.items():
        exact = [key for key in chosen.get(part, ()) if fields.plain(key) == named]
        if exact and is_whole and part not in shape.columns and part not in apart:
            chosen[part] = exact
    if fields.PROMPT not in chosen and fields.PROMPT in own and fields.INPUT in chosen:
        first, *beside = chosen.pop(fields.INPUT)
        chosen[fields.PROMPT] = [first]
        if beside:
            chosen[fields.INPUT] = beside
    for part in (fields.PROMPT, fields.COMPLETION, fields.CHOSEN, fields.TEXT, fields.INPUT):
        if len(chosen.get(part, ())) > 1 and part not in apart:
            first, second = chosen[part][:2]
            raise DataError(
                f"{where}: both {first} and {second} could be the {part}",
                hint=f"say which: data.columns: {{{part}: {first}}}, or data.ignore: [{second}]",
            )
    return chosen


def _spelling(rows: Rows, columns: Sequence[str], form: str) -> str:
    """`sharegpt` where the messages say `from`, else `messages`; as the recipe has it where none says."""
    for row in rows:
        turns = next((parsed(row.values.get(key)) for key in columns if row.values.get(key)), None)
        first = turns[0] if isinstance(turns, list) and turns else turns
        if isinstance(first, Mapping):
            return SHAREGPT if "from" in map(fields.plain, first) else MESSAGES
    return form


def _named(parts: Mapping[str, Sequence[str]]) -> str:
    """The name of a format of prompt and completion, by its columns."""
    pair = tuple(fields.plain(parts[part][0]) for part in (fields.PROMPT, fields.COMPLETION) if part in parts)
    return next((name for name, (p, _, c) in _PAIRS.items() if (p, c) == pair), PROMPT)
