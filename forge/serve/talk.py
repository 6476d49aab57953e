"""A conversation whose prompt a server is asked for, with all that the prompt hangs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forge.chat.template import ChatTemplate

Kind = Literal["text", "tools", "tool calls", "thinking"]


@dataclass(frozen=True)
class Talk:
    """Messages as a chat template takes them, and the tools, as JSON schemas, that the model may call."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()

    @property
    def kind(self) -> Kind:
        """What a server must hand to the template besides texts, the rarest of it."""
        if any(message.get("tool_calls") or message["role"] == "tool" for message in self.messages):
            return "tool calls"
        if any(message.get("reasoning_content") for message in self.messages):
            return "thinking"
        return "tools" if self.tools else "text"

    def prompt(self, template: ChatTemplate) -> str:
        """What training had before the answer."""
        messages = template.as_read(self.messages)
        return template.render(messages, add_generation_prompt=True, tools=self.tools)


@dataclass(frozen=True)
class OfKind:
    """Of how many `prompts` of a kind a server wrote the `same` as training did.

    `why` is the first difference, or why the server wrote none; empty where all are the same.
    """

    kind: Kind
    prompts: int
    same: int
    why: str = ""


def by_kind(talks: Sequence[Talk]) -> dict[Kind, list[Talk]]:
    """The conversations of each kind, those of texts first."""
    kinds: dict[Kind, list[Talk]] = {}
    for talk in sorted(talks, key=lambda talk: talk.kind != "text"):
        kinds.setdefault(talk.kind, []).append(talk)
    return kinds
