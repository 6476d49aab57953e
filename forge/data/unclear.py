"""Exports that are known, and that do not say by themselves what is to be learned: each with the way out.

Not covered: exports that say it (`exports`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge.data.conversation import Row
from forge.data.layout import Shape
from forge.data.paths import texts_inside, with_paths
from forge.errors import DataError

_ROWS = 'write rows of {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}'
_BETWEEN_PEOPLE = (
    f"{_ROWS}: which of these people the model is to speak as, and where a conversation ends, the file "
    "does not say"
)
_INSIDE = "data.columns takes what is inside"


@dataclass(frozen=True)
class _Export:
    """An export that has a value at each of these paths, and what to do with it."""

    name: str
    marks: tuple[str, ...]
    way: str
    by_roles: bool = False
    """Whether `data.roles` can say what the file does not."""


_EXPORTS = (
    _Export("an export of Discord", ("guild", "channel", "messages.0.author"), _BETWEEN_PEOPLE, True),
    _Export("an export of Telegram", ("messages.0.from_id",), _BETWEEN_PEOPLE, True),
    _Export("an export of Telegram", ("chats.list",), _BETWEEN_PEOPLE),
    _Export("an export of Messenger", ("participants", "messages.0.timestamp_ms"), _BETWEEN_PEOPLE),
    _Export("an export of Slack", ("type", "user", "ts", "text"), _BETWEEN_PEOPLE),
    _Export("an export of Teams", ("messageType", "body.contentType"), _BETWEEN_PEOPLE),
    _Export(
        "an export of Google Takeout",
        ("header", "title", "time", "products.0"),
        f"{_ROWS}: a prompt is its title without the first word, an answer is HTML in safeHtmlItem",
    ),
    _Export(
        "an export of Label Studio with its annotations",
        ("annotations.0.result", "data"),
        "export JSON-MIN, which has a column for each label; or " + _INSIDE,
    ),
    _Export("an export of Argilla", ("fields", "suggestions", "responses"), _INSIDE),
    _Export(
        "an export of feedback of Open WebUI",
        ("snapshot.chat", "data.rating"),
        "export the chats themselves (Settings, Chats), or data.format: module:function reads them",
    ),
    _Export(
        "a conversation of LM Studio",
        ("messages.0.versions",),
        f"{_ROWS}: each message's text is in its version currentlySelected",
    ),
    _Export(
        "a log of SillyTavern",
        ("character_name", "chat_metadata"),
        "its lines are the messages of one conversation: jq -sc '{messages: .[1:]}' FILE.jsonl > rows.jsonl",
    ),
    _Export(
        "a character card",
        ("spec", "data.first_mes"),
        "it describes a character and has no conversation: its description can be the system prompt of rows",
    ),
)


def refuse_unclear(row: Row, shape: Shape) -> None:
    """Raise `DataError` for the row of such an export, where the recipe does not say how it is meant."""
    if shape.reader is not None or shape.columns:
        return
    for export in _EXPORTS:
        if shape.roles and export.by_roles:
            continue
        if all(_has(row.values, mark) for mark in export.marks):
            way = export.way
            if way.endswith(_INSIDE):
                way += f", such as {', '.join(texts_inside(row.values))}: {{prompt: ..., completion: ...}}"
            raise DataError(f"{row.file}:{row.line} is {export.name}", hint=way)


def _has(values: Mapping[str, Any], path: str) -> bool:
    return with_paths(values, [path]).get(path) is not None
