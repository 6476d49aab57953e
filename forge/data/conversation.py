"""What a row of any format becomes: a conversation with typed turns, or a plain text.

Readers (`conversations`) make it, `tokens` encodes it, `split` compares it. Nothing here knows a file
format or a template.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from forge.codec import Json
from forge.errors import Problem

_SORTED = json.JSONEncoder(sort_keys=True)


@dataclass(frozen=True)
class Place:
    """Where a row stands: its file and the line in it, or its number from 1 where a file has no lines."""

    file: str
    line: int

    def problem(self, message: str, field: str = "") -> Problem:
        return Problem(message, field, self.file, self.line)


@dataclass(frozen=True)
class Row:
    """One record and where it stands: the line of a text file, else its number from 1."""

    values: Mapping[str, Any]
    file: str
    line: int

    @property
    def place(self) -> Place:
        return Place(self.file, self.line)

    def problem(self, message: str, field: str = "") -> Problem:
        return self.place.problem(message, field)


class Rows(Protocol):
    """Rows that can be gone through again and again: a list, or those of a file, read anew each time."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...


@dataclass(frozen=True)
class RowsOf:
    """Rows that `make` makes anew each time; they are `count`."""

    count: int
    make: Callable[[], Iterator[Row]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        return self.make()


@dataclass(frozen=True)
class ToolCall:
    """One call that an assistant turn makes; `arguments` are JSON, as the row has them."""

    name: str
    arguments: Json
    id: str = ""

    def as_json(self) -> dict[str, Json]:
        """In the shape that chat templates and OpenAI's API use."""
        call: dict[str, Json] = {
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }
        return {"id": self.id, **call} if self.id else call


@dataclass(frozen=True)
class Turn:
    """One turn. `role` is system, user, assistant or tool; `content` is "" where a turn only calls tools.

    `trained` is what the row itself says of the loss: False for a turn that must carry none, True for
    one that must, None where it says nothing. Only an assistant's turn is ever trained.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    trained: bool | None = None

    def as_message(self) -> dict[str, Json]:
        """What a chat template is given: role and content, and the rest only where there is some."""
        message: dict[str, Json] = {"role": self.role, "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_json() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if self.name:
            message["name"] = self.name
        return message


@dataclass(frozen=True)
class RowVariables:
    """Values of the chat template's variables that a row has in one of its columns (`enable_thinking`)."""

    column: str
    values: Mapping[str, Json]


@dataclass(frozen=True)
class Conversation:
    """The turns of one row, ending with an assistant's; or, with no turns, `text` that is learned whole.

    `tools` are the functions that a template shows the model, as JSON schemas.
    """

    turns: tuple[Turn, ...]
    place: Place
    tools: tuple[Mapping[str, Json], ...] = ()
    text: str = ""
    weight: float = 1.0
    """How often it is seen in an epoch, against the others."""
    rejected: tuple[Turn, ...] = ()
    """Of a preference pair: the same turns with the answer that was rejected."""
    desirable: bool | None = None
    """Of a single answer with a label: whether it is good."""
    variables: RowVariables | None = None

    def messages(self) -> list[dict[str, Json]]:
        """What a chat template is given."""
        return [turn.as_message() for turn in self.turns]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for rows that say the same, whatever of it is trained."""
        content = [self.messages(), list(map(dict, self.tools)), self.text]
        return hashlib.sha256(_SORTED.encode(content).encode()).hexdigest()
