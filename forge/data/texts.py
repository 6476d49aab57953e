"""A text as a row holds it: itself, a list of parts, or a list or an object written as text.

Raises `BadRowError` for what is no text; what was done to rows is counted in `Notes`.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from typing import Any

from forge.codec import JSON, RepeatedKeyError
from forge.data import fields

TOO_DEEP = "is nested too deeply"
_LONGEST_LITERAL = 10_000_000


class BadRowError(Exception):
    """A row that cannot be used: why, and the field where."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


@dataclass
class Notes:
    """What was done to the rows that were read: note -> number of rows, and who was taken for whom."""

    counts: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    roles: dict[str, str] = field(default_factory=dict)


def text_of(value: object, place: str, *, empty_ok: bool = False) -> str:
    """A text, or the texts of a list of parts one after the other."""
    if isinstance(value, (list, tuple)) and (
        len(value) < 2 or any(isinstance(part, Mapping) for part in value)
    ):
        value = "".join(_part(part, f"{place}[{number}]") for number, part in enumerate(value))
    elif isinstance(value, Mapping):
        value = _part(value, place)
    if value is None or value != value:  # a table's NaN
        value = ""
    if isinstance(value, list):
        raise BadRowError("is a list, not one text; data.format: module:function makes one of it", place)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise BadRowError(f"is {kind}, not text; data.format: module:function makes one of it", place)
    if why := unwritable(value):
        raise BadRowError(f"has {why}", place)
    if not value.strip() and not empty_ok:
        raise BadRowError("is empty", place)
    return value


# What a message, a typed part or an API's answer has: an object with one of these is no data.
_OF_MESSAGES = {
    "type", "content_type", "parts", "role", "from", "message", "messages", "choices", "candidates",
    "generations", "output",
}  # fmt: skip
_OF_TEXT = ("text", "content", "value")
# What may stand beside a text and is no part of what is said.
_BESIDE_TEXT = {"annotations", "citations", "cache_control", "logprobs"}


def written(value: object, place: str, notes: Notes) -> object:
    """A number or an object as JSON writes it: a class to learn, or what is to be taken out of a text."""
    if isinstance(value, bool):
        what = "booleans"
    elif isinstance(value, (int, float, Decimal)) and value == value:
        what = "numbers"
    elif isinstance(value, (date, time)):
        what = "dates"
    elif isinstance(value, Mapping) and _is_data(value):
        what = "objects"
        text_of(json.dumps(value, ensure_ascii=False), place)
    else:
        return value
    form = "ISO 8601 has them" if what == "dates" else "JSON"
    ways = f"written as {form}; data.format: module:function gives other words"
    notes.counts[f"{what} in {place}, {ways}"] += 1
    return str(value) if isinstance(value, (Decimal, date, time)) else json.dumps(value, ensure_ascii=False)


def _is_data(value: Mapping[str, Any]) -> bool:
    """Whether an object is to be learned whole: as words, keys of it would be lost."""
    texts = [value[key] for key in _OF_TEXT if key in value]
    if not value or _OF_MESSAGES & value.keys() or any(isinstance(text, list) for text in texts):
        return False
    beside = [key for key in value if key not in _OF_TEXT and value[key] is not None]
    return len(texts) != 1 or not _BESIDE_TEXT.issuperset(beside)


def unwritable(text: str) -> str:
    """What a text has that no text has: "" for nothing."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return "half a character (lone surrogate)"
    return "a null character, at which programs in C end a text" if "\0" in text else ""


_TEXTS = ("text", "input_text", "output_text")
_THOUGHTS = ("thinking", "reasoning")
_BELONGS: Mapping[str, str] = {
    **dict.fromkeys(
        _THOUGHTS, "thinking stands in an assistant's content, or beside it as reasoning_content"
    ),
    "tool_use": "a call is made by a turn of the assistant",
    "tool_result": "what a tool answers belongs to a conversation",
    "refusal": "a refusal is learned as text: {type: text, text: ...}",
}


def _part(part: object, place: str) -> str:
    if part is None or isinstance(part, str):
        return part or ""
    if isinstance(part, Mapping):
        if part.get("content_type") == "text" and isinstance(part.get("parts"), list):  # ChatGPT's export
            return text_of(list(map(_as_part, part["parts"])), place, empty_ok=True)
        kind = part.get("type", "text")
        if kind not in _TEXTS:
            why = _BELONGS.get(str(kind), "only text can be learned here")
            raise BadRowError(f"is a part of type {kind!r}; {why}", place)
        texts = [part[key] for key in _OF_TEXT if isinstance(part.get(key), str)]
        if len(texts) == 1:
            return str(texts[0])
    keys = f"; its keys are: {', '.join(map(writable, map(str, part)))}" if isinstance(part, Mapping) else ""
    raise BadRowError(f"is not a text part: {{type: text, text: ...}}{keys}", place)


def _as_part(part: object) -> object:
    return {"text": part} if isinstance(part, str) else part


def is_words(value: object) -> bool:
    """Whether `value` is a text, or parts of one, not data."""
    parts = value if isinstance(value, list) else [value]
    return all(
        part is None
        or isinstance(part, str)
        or (isinstance(part, Mapping) and {"type", "text"} & part.keys())
        for part in parts
    )


def is_of_parts(value: object) -> bool:
    """Whether `value` is a list of parts of one text, not of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and part.get("type") in (*_TEXTS, *_BELONGS) for part in value)
        and not any(fields.message_part(key) == fields.ROLE for part in value for key in part)
    )


def thoughts(content: object) -> tuple[str, object]:
    """The thinking among the parts of an assistant's content, and the other parts."""
    if not isinstance(content, list):
        return "", content
    thoughts = [part for part in content if isinstance(part, Mapping) and part.get("type") in _THOUGHTS]
    texts = [next((part[key] for key in (*_THOUGHTS, "text") if key in part), "") for part in thoughts]
    if not all(isinstance(text, str) for text in texts):
        return "", content
    return "".join(texts), [part for part in content if part not in thoughts]


def parsed(value: object) -> object:
    """`value`, or what it says where it is JSON or a Python literal in a text (tables hold lists so)."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", '"[', '"{')):
        return value
    try:
        made = JSON.decode(value)
        inner = parsed(made) if isinstance(made, str) else made  # JSON in JSON
        return value if isinstance(inner, str) else inner
    except RepeatedKeyError:
        return value
    except (ValueError, RecursionError):
        pass
    try:
        if len(value) >= _LONGEST_LITERAL:
            return value
        # numpy writes an array of objects without commas; a line's end within a text is written \\n.
        return ast.literal_eval(value.strip().replace("}\n {", "}, {"))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def writable(name: str) -> str:
    """A name as a file can hold it, half a character written out."""
    return name.encode("utf-8", "backslashreplace").decode() or "(no name)"
