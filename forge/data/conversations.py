"""Rows to conversations: prompt and completion, messages, ShareGPT, Alpaca.

Every row either becomes a conversation or is named as a problem; nothing is dropped or guessed.
Not covered: tool calls, images, and plain-text rows (there is no chat to serve in them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forge.data.conversation import Conversation, Turn
from forge.data.sources import Row, refuse
from forge.errors import DataError, Problem

Columns = Mapping[str, str]
_ROLES = ("system", "user", "assistant")
# ShareGPT's names (E6). Others are refused: a template drops a role that it does not know.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_MESSAGES_KEYS = ("messages", "conversations")


def detect_format(row: Row, columns: Columns) -> str:
    """`prompt`, `messages`, `sharegpt` or `alpaca`, from the mapped columns or else the row's keys."""
    if {"prompt", "completion"} <= columns.keys():
        return "prompt"
    keys = row.values.keys()
    listed = (
        [columns["messages"]] if "messages" in columns else [key for key in _MESSAGES_KEYS if key in keys]
    )
    if listed:
        turns = row.values.get(listed[0])
        is_sharegpt = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
        return "sharegpt" if is_sharegpt else "messages"
    if {"prompt", "completion"} <= keys:
        return "prompt"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    raise DataError(
        f"{row.file}:{row.line}: cannot tell the data's format from its columns: {', '.join(keys)}",
        hint="say which is which: data.columns: {prompt: ..., completion: ...} or {messages: ...}",
    )


def to_conversations(rows: Sequence[Row], form: str, columns: Columns) -> list[Conversation]:
    """Every row as a conversation; raises one `DataError` with every row that cannot be one."""
    if form == "auto":
        form = detect_format(rows[0], columns)
    if form == "text":
        raise DataError(
            "data.format: text: plain text has no turns, so there is no chat to train or to serve",
            hint="give prompt and completion, or messages",
        )
    readers: Mapping[str, Callable[[Row, Columns], tuple[Turn, ...]]] = {
        "prompt": _from_prompt,
        "messages": _from_messages,
        "sharegpt": _from_sharegpt,
        "alpaca": _from_alpaca,
    }
    problems: list[Problem] = []
    conversations: list[Conversation] = []
    for row in rows:
        try:
            messages = readers[form](row, columns)
            _check_turns(messages)
        except _BadRowError as bad:
            problems.append(row.problem(bad.message, bad.field))
        else:
            conversations.append(Conversation(messages, row.place))
    names = ", ".join(str(key) for key in rows[0].values)
    refuse(problems, f"{len(problems)} of {len(rows)} rows cannot be used", f"the columns are: {names}")
    return conversations


class _BadRowError(Exception):
    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


def _text(values: Mapping[str, Any], column: str, *, empty_ok: bool = False) -> str:
    if column not in values:
        raise _BadRowError("there is no such column", column)
    value = values[column]
    if not isinstance(value, str):
        raise _BadRowError(f"is {type(value).__name__}, not text", column)
    if not value.strip() and not empty_ok:
        raise _BadRowError("is empty", column)
    return value


def _from_prompt(row: Row, columns: Columns) -> tuple[Turn, ...]:
    messages = []
    if "system" in columns:
        system = _text(row.values, columns["system"], empty_ok=True)
        messages += [Turn("system", system)] if system.strip() else []
    prompt = _text(row.values, columns.get("prompt", "prompt"))
    completion = _text(row.values, columns.get("completion", "completion"))
    return (
        *messages,
        Turn("user", prompt),
        Turn("assistant", completion),
    )


def _turns(row: Row, columns: Columns) -> tuple[str, list[Mapping[str, Any]]]:
    column = columns.get("messages") or next((key for key in _MESSAGES_KEYS if key in row.values), "messages")
    turns = row.values.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise _BadRowError("is not a list of messages", column)
    return column, turns


def _from_messages(row: Row, columns: Columns) -> tuple[Turn, ...]:
    column, turns = _turns(row, columns)
    messages = []
    for number, turn in enumerate(turns):
        place = f"{column}[{number}]"
        if extra := [key for key in ("tool_calls", "tool_call_id") if turn.get(key)]:
            raise _BadRowError(f"has {extra[0]}, which is not supported", place)
        role = turn.get("role")
        if role not in _ROLES:
            raise _BadRowError(f"role {role!r} is not one of {', '.join(_ROLES)}", place)
        try:
            messages.append(Turn(role, _text(turn, "content", empty_ok=role == "system")))
        except _BadRowError as bad:
            raise _BadRowError(bad.message, f"{place}.{bad.field}") from None
    return tuple(messages)


def _from_sharegpt(row: Row, columns: Columns) -> tuple[Turn, ...]:
    column, turns = _turns(row, columns)
    messages = []
    for number, turn in enumerate(turns):
        speaker = turn.get("from")
        if speaker not in _SHAREGPT_ROLES:
            known = ", ".join(_SHAREGPT_ROLES)
            raise _BadRowError(f"from {speaker!r} is not one of {known}", f"{column}[{number}]")
        messages.append(Turn(_SHAREGPT_ROLES[speaker], _text(turn, "value")))
    return tuple(messages)


def _from_alpaca(row: Row, columns: Columns) -> tuple[Turn, ...]:
    instruction = _text(row.values, "instruction")
    given = row.values.get("input") or ""
    prompt = f"{instruction}\n\n{given}" if str(given).strip() else instruction
    return (
        Turn("user", prompt),
        Turn("assistant", _text(row.values, "output")),
    )


def _check_turns(messages: tuple[Turn, ...]) -> None:
    if messages[-1].role != "assistant":
        raise _BadRowError("the last message is not the assistant's: there is nothing to learn")
    if any(message.role == "system" for message in messages[1:]):
        raise _BadRowError("a system message that is not the first")
    if not any(message.role == "user" for message in messages):
        raise _BadRowError("no message is the user's")
