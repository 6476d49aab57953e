"""A smoke query and its answer, as values: nothing here asks a server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge.serve.endpoint import Message


@dataclass(frozen=True)
class Call:
    """A call of a tool that an answer must make; `arguments` None: any JSON object."""

    name: str
    arguments: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        if self.arguments is None:
            return f"a call of {self.name} with any arguments"
        return f"a call of {self.name} with {json.dumps(self.arguments, ensure_ascii=False)}"


@dataclass(frozen=True)
class Query:
    """A conversation that ends with the user's turn; the pattern and the call its answer must hold."""

    messages: tuple[Message, ...]
    expect: str | None = None
    max_tokens: int = 256
    tools: tuple[Mapping[str, Any], ...] = ()
    expect_call: Call | None = None


@dataclass(frozen=True)
class Answer:
    """What came back. `prompt` is the user's last turn; `finish_reason` `length`: it was cut."""

    prompt: str
    answer: str
    ok: bool
    finish_reason: str
    expect: str | None
