"""What the columns of a row say beside its words: refused, listed as unused, or a row that is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forge.data import fields
from forge.data.conversation import Row, RowVariables, Turn
from forge.data.layout import EMPTY, PREFERENCE, Layout, Shape
from forge.data.texts import BadRowError, Notes, parsed, writable

# Splits of which a model is asked, not taught.
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval", "heldout")


def refuse_keys(row: Row, layout: Layout, shape: Shape, notes: Notes) -> None:
    for key in layout.unused:
        value = row.values.get(key)
        if value in EMPTY or shape.ignores(key):
            continue
        why = fields.ROW_REFUSED.get(fields.plain(key))
        if fields.plain(key) == "mask" and isinstance(value, str):
            why = _masks(value, shape)
            if why is None:
                continue
        if fields.plain(key) == "split" and isinstance(value, str) and fields.plain(value) in _HELD_OUT:
            notes.counts[f"{key} is {value}: were they meant to be held out?"] += 1
        tokens = isinstance(value, list) and all(isinstance(item, int) for item in value)
        if why and fields.switch(value) is False:
            continue
        if why and (tokens or not why.startswith("the row is tokenized")):
            raise BadRowError(f"{why}; data.ignore: [{key}] leaves it out of account", key)
        if fields.sets_loss(key, value):
            raise BadRowError(
                "forge does not know this column, and it may say what carries loss: weight: 0 (or 1) does; "
                f"data.ignore: [{key}] leaves it out of account",
                key,
            )
        notes.unused[writable(key)] += 1


def refuse_beside(row: Row, layout: Layout, shape: Shape, turns: Sequence[Turn]) -> None:
    """Refuse what may belong to the conversation, plays no part in it, and stands in none of its turns."""
    _refuse_of_prompt(row, layout, shape, turns)
    _refuse_thinking(row, layout, shape, turns)


def _refuse_of_prompt(row: Row, layout: Layout, shape: Shape, turns: Sequence[Turn]) -> None:
    """Refuse a column of the prompt that plays no part and whose words no turn before the last answer has."""
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    asked = turns[: answers[-1]] if answers else turns
    for key in layout.unused:
        value = row.values.get(key)
        if fields.plain(key) not in fields.OF_PROMPT or value in EMPTY or shape.ignores(key):
            continue
        words = value if isinstance(value, list) else [value]
        if all(
            isinstance(word, str) and any(_has_words(turn.content, word.strip()) for turn in asked)
            for word in words
        ):
            continue
        way = f"data.columns: {{system: {key}}} puts it before it; "
        if not isinstance(value, str):
            way = "data.format: module:function writes it into the prompt; "
        raise BadRowError(
            f"stands beside the conversation; {way}data.ignore: [{key}] leaves it out of account", key
        )


def _refuse_thinking(row: Row, layout: Layout, shape: Shape, turns: Sequence[Turn]) -> None:
    """Refuse a column that may be the thinking before an answer, where nothing says so and no turn has it."""
    if layout.format == PREFERENCE or layout.value(row, fields.REASONING)[1] not in EMPTY:
        return
    for key in layout.unused:
        value = row.values.get(key)
        texts = [value] if isinstance(value, str) else value
        if fields.thinker(key) is None or shape.ignores(key) or not isinstance(texts, list):
            continue
        words = "\n".join(text for turn in turns for text in (turn.content, turn.reasoning))
        # A word by itself says how the row was made.
        thoughts = [text for text in texts if isinstance(text, str) and " " in text.strip()]
        if thoughts and not all(text.strip() in words for text in thoughts):
            answer = _answer_with(key, row)
            raise BadRowError(
                f"may be the thinking before an answer: data.columns: {{{answer}reasoning: {key}}} learns it "
                f"so, with a template that shows it; data.ignore: [{key}] leaves it out of account",
                key,
            )


def _answer_with(thinking: str, row: Row) -> str:
    """The setting for the answer whose thinking this is, where a column's name says it."""
    whose = fields.thinker(thinking)
    answers = [key for key in row.values if whose and fields.answerer(key) == whose]
    answers += [key for key in row.values if not whose and fields.plain(key) == "attempt"]
    return f"completion: {answers[0]}, " if answers else ""


def _has_words(text: str, words: str) -> bool:
    """Whether `words` stand in `text`, not as a part of a longer word or number."""
    at = text.find(words)
    while at >= 0:
        end = at + len(words)
        if not _is_within_word(text[at - 1 : at + 1]) and not _is_within_word(text[end - 1 : end + 1]):
            return True
        at = text.find(words, at + 1)
    return False


def _is_within_word(around: str) -> bool:
    # Chinese, Japanese and Thai have no spaces between words.
    return len(around) == 2 and around.isascii() and around.isalnum()


def _masks(speaker: str, shape: Shape) -> str | None:
    """NeMo's `mask` names who carries no loss: why that cannot be, or None where it is the user."""
    if fields.role_of(speaker, shape.roles) in ("user", "system"):
        return None
    return f"is {speaker!r}: only answers of the assistant carry loss here"


def refuse_two_columns(row: Row, layout: Layout, notes: Notes) -> None:
    """Refuse a row that says one thing twice and differently; a second conversation is not used."""
    for part, columns in layout.parts.items():
        if len(columns) < 2:
            continue
        filled = [column for column in columns if row.values.get(column) not in EMPTY]
        for column in filled[1:]:
            if part == fields.MESSAGES:
                notes.unused[writable(column)] += 1
            elif parsed(row.values[column]) != parsed(row.values[filled[0]]):
                raise BadRowError(
                    f"both {filled[0]} and {column} could be the {part}; data.ignore: [{column}] leaves it "
                    "out of account",
                    column,
                )


def variables_of(row: Row, layout: Layout) -> RowVariables | None:
    """The chat template's variables that a row has: in one object, or `enable_thinking` by itself."""
    column, value = layout.value(row, fields.VARIABLES)
    value = parsed(value)
    if value in EMPTY:
        return None
    if isinstance(value, Mapping):
        return RowVariables(column, {str(name): item for name, item in value.items() if item is not None})
    on = fields.switch(value)
    if on is None or fields.plain(column) != fields.plain(fields.ENABLE_THINKING):
        raise BadRowError(f"is {value!r}; it can be an object of variables, enable_thinking a switch", column)
    return RowVariables(column, {fields.ENABLE_THINKING: on})


def left_out(row: Row, layout: Layout, notes: Notes, *, labels: bool = False) -> str | None:
    """Why the row says of itself that it is not to be learned; with `labels` they say something else."""
    for part in (fields.TRAINED, *(() if labels else (fields.LABEL,)), fields.WEIGHT):
        column, value = layout.value(row, part)
        if value in EMPTY:
            continue
        # Any other label may be one of many classes.
        is_class = part == fields.LABEL and str(value).lower() not in ("true", "false")
        on = None if is_class else fields.switch(value)
        if on is False:
            return f"{column} is {str(value).lower()}"
        if on is None and part == fields.LABEL:
            notes.unused[writable(column)] += 1
        elif on is None:
            also = ", and a source in data.source can have a weight" if part == fields.WEIGHT else ""
            raise BadRowError(
                f"is {value!r}; a row's {fields.plain(column)} can be 0 or 1 here: data.ignore: [{column}] "
                f"leaves it out of account{also}",
                column,
            )
    return None
