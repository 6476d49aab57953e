"""Conversations that stand in one text with the speakers' names in it, as Guanaco, HH-RLHF and glaive do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard

from forge.codec import Json
from forge.data.conversation import Conversation, Place, Turn
from forge.data.fields import role_of
from forge.data.texts import BadRowError, Notes, text_of
from forge.data.turns import calls_of, finished, tools_of

# A line of a messenger's log begins with its time, another log's with who speaks.
_LOG = re.compile(r"\s*\[?\d{1,4}[./-]\d{1,2}[./-]\d{1,4},? \d{1,2}:\d\d|[\s#*\[]*(\w+)[*\] ]*:")
_DIALOGUE = re.compile(r"(?:(?:^|\n)\s*(?=[HAS])|### ?)(Human|Assistant|System):[ \t]?")


def of_text(text: str, column: str, place: Place, notes: Notes, before: Sequence[Turn] = ()) -> Conversation:
    """The conversation in a text as Guanaco has it, after these turns; or any other text, learned whole."""
    if "### Human:" in text and "### Assistant:" in text:
        notes.counts["texts of ### Human: and ### Assistant:, read as conversations"] += 1
        return Conversation(finished([*before, *dialogue(text, column)], notes), place)
    speaker = _LOG.match(text)
    if speaker and (speaker[1] is None or role_of(speaker[1], {})):
        notes.counts["texts that begin as a log of a chat, learned whole: messages teach answers only"] += 1
    return Conversation((), place, text=text)


def dialogue(text: str, place: str) -> Iterator[Turn]:
    """The turns of a text that marks them `Human:` and `Assistant:`, as Guanaco and HH-RLHF do."""
    pieces = _DIALOGUE.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise BadRowError(
            "is one text without Human: and Assistant:, and there is no prompt beside it", place
        )
    roles = {"Human": "user", "Assistant": "assistant", "System": "system"}
    for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True):
        yield Turn(roles[speaker], text_of(words.strip(), place))


_CHAT = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|SYSTEM|FUNCTION RESPONSE):[ \t]?")
_CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*$", re.DOTALL)
_QUOTED = re.compile(r"(\"arguments\":\s*)'(.*)'(?=\s*\}\s*$)", re.DOTALL)
_ENDS = ("<|endoftext|>", "</s>")


def is_chat(value: object) -> TypeGuard[str]:
    """Whether `value` is a text that marks its turns `USER:` and `ASSISTANT:`, as glaive's does."""
    return isinstance(value, str) and {"USER", "ASSISTANT"} <= {*_CHAT.findall(value)}


def chat_turns(text: str, place: str) -> Iterator[Turn]:
    """The turns of such a text, its calls and what functions answer included."""
    before, *pieces = _CHAT.split(text)
    if before.strip():
        raise BadRowError("begins before the first USER:", place)
    roles = {"USER": "user", "ASSISTANT": "assistant", "SYSTEM": "system", "FUNCTION RESPONSE": "tool"}
    for speaker, words in zip(pieces[::2], pieces[1::2], strict=True):
        answer = words.strip()
        for end in _ENDS:
            answer = answer.removesuffix(end).rstrip()
        call = _CALL.search(answer) if speaker == "ASSISTANT" else None
        if call is None:
            yield Turn(roles[speaker], text_of(answer, place))
            continue
        # Its arguments are JSON in single quotes.
        written = _QUOTED.sub(lambda quoted: quoted[1] + json.dumps(quoted[2].replace("\\'", "'")), call[1])
        yield Turn("assistant", answer[: call.start()].rstrip(), tool_calls=calls_of(f"[{written}]", place))


def with_functions(turns: Sequence[Turn], place: str) -> tuple[list[Turn], tuple[Mapping[str, Json], ...]]:
    """Such a text's system turns without `SYSTEM:`, and the functions that stand as JSON at their end."""
    made: list[Turn] = []
    functions: list[object] = []
    for turn in turns:
        words, brace, listed = turn.content.removeprefix("SYSTEM:").strip().partition("\n{")
        objects = _objects(brace.strip() + listed)
        functions += objects or []
        if objects is None:
            words += brace + listed
        made.append(replace(turn, content=words.strip()))
    return made, tools_of(functions, place)


def _objects(text: str) -> list[object] | None:
    """The JSON objects that a text is made of; None where it has anything else."""
    objects: list[object] = []
    at, decoder = 0, json.JSONDecoder()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        objects.append(value)
        at += len(text[at:]) - len(text[at:].lstrip())
    return objects
