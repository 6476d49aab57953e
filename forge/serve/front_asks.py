"""What a request may ask that a server of texts does not do, and that llama-server leaves out in silence.

Who asks is told so, for an answer without it is another one. Hints that change no answer's kind (`store`,
`metadata`, `reasoning_effort`) pass, and so do tools that a service would run itself: a model that does not
know them calls none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ALONE = "this server keeps no conversations: send all of the turns"
_INSTEAD: Mapping[str, str] = {
    "functions": "an older form: use tools",
    "function_call": "an older form: use tool_choice",
    "audio": "this server answers in text",
    "web_search_options": "this server searches nothing",
    "conversation": _ALONE,
    "previous_response_id": _ALONE,
    "background": "this server answers at once: leave it out",
    "suffix": "/infill writes what stands between two texts",
    "output_format": "/v1/chat/completions and /v1/responses hold an answer to a schema",
}
_OTHER_THAN_TEXT = {"image", "audio", "video", "file", "document"}


def not_done(fields: Mapping[str, Any]) -> str:
    """Why a request cannot be answered as it is meant; empty where it can."""
    for name, instead in _INSTEAD.items():
        if fields.get(name):
            return f"{name}: {instead}"
    if fields.get("modalities") not in (None, ["text"]):
        return "modalities: this server answers in text"
    best, several = fields.get("best_of"), fields.get("n") or 1
    if best not in (None, several):
        return "best_of: this server chooses among no answers: ask for n of them"
    if is_forced(fields) and not fields.get("tools"):
        return "tool_choice: there are no tools to choose from"
    for kind in _kinds([fields.get("messages"), fields.get("input")]):
        if not _OTHER_THAN_TEXT.isdisjoint(kind.split("_")):
            return f"this server reads text only, not {kind}"
    return ""


def is_forced(fields: Mapping[str, Any]) -> bool:
    """Whether a request wants a call of a tool and nothing else, as OpenAI or Anthropic writes it."""
    choice = fields.get("tool_choice")
    if isinstance(choice, dict):
        return choice.get("type") not in ("auto", "none")
    return choice == "required"


def _kinds(contents: object) -> Iterator[str]:
    """The types of the parts of messages, also inside what a tool has answered."""
    for part in contents if isinstance(contents, list) else [contents]:
        if isinstance(part, list):
            yield from _kinds(part)
        elif isinstance(part, dict):
            if isinstance(kind := part.get("type"), str):
                yield kind
            yield from _kinds(part.get("content"))
