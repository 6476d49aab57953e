"""Whether a template's text shows what a row holds: contents, thinking, tools and their calls.

A template that has no place for one of them leaves it out without a word; the model would learn an answer
without what it rests on. Thinking of earlier turns may be left out: then serving leaves it out as well.

Not covered: whether it stands at the right place; the order of turns is the template's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from forge.chat.template import ChatTemplate
from forge.codec import Json
from forge.data.conversation import Conversation, Turn
from forge.errors import DataError

OPENS, CLOSES = "<think>", "</think>"


def opens_thinking(prompt: str) -> bool:
    """Whether the generation prompt has begun the answer's thinking."""
    return prompt.rstrip().endswith(OPENS)


def closes_thinking(prompt: str) -> bool:
    """Whether the generation prompt holds an answer's thinking already: an empty one."""
    return prompt.rstrip().endswith(CLOSES)


def opens_with_thinking(text: str) -> bool:
    return text.lstrip().startswith(OPENS)


def after_opened(turn: Turn, number: int, template: ChatTemplate) -> str:
    """What the model is to generate for `turn` after a prompt that opens the thinking.

    Raises `DataError` for an answer that does not begin with its thinking, or calls a tool.
    """
    if not has_thinking(turn):
        raise DataError(
            f"message {number} (assistant) has no thinking, and the template's prompt opens {OPENS}",
            hint="train.template_variables: {enable_thinking: false} answers without thinking"
            if "enable_thinking" in template.variables_read()
            else f"begin these answers with {OPENS}...{CLOSES}, or use a template that does not open it",
        )
    if turn.tool_calls:
        raise DataError(
            f"message {number} (assistant) calls a tool after its thinking, which this template cannot show",
            hint="use a template that shows the thinking of an answer, or leave these rows out",
        )
    if turn.reasoning.strip():
        rest = f"{turn.reasoning.strip()}\n{CLOSES}\n\n{turn.content.strip()}"
    else:
        rest = turn.content.strip().removeprefix(OPENS).lstrip("\n")
    if OPENS in rest:
        raise DataError(
            f"message {number} (assistant) holds {OPENS} again, which the template's prompt opens",
            hint=f"begin these answers with one {OPENS}...{CLOSES}",
        )
    return rest


def has_thinking(turn: Turn) -> bool:
    return bool(_parts(turn)[0])


def earlier_thinking(turns: Sequence[Turn], prompt: str) -> bool:
    """Whether `prompt` shows all thinking of `turns`, those before the answer."""
    thoughts = (_parts(turn)[0] for turn in turns if turn.role == "assistant")
    return all(_end_of(thought, prompt) is not None for thought in thoughts if thought)


def check_prompt(conversation: Conversation, text: str, without_tools: str) -> None:
    """Refuse a row whose turns or tools `text` leaves out; the thinking of answers is not looked for.

    `without_tools` is what the template writes of the same messages where it is given no tools.
    """
    seen = 0
    for number, turn in enumerate(conversation.turns):
        # In order, so that a word of one turn is not taken for another; the system's may stand anywhere.
        start = 0 if turn.role == "system" else seen
        at = _end_of(_parts(turn)[1], text, start)
        if at is None:
            raise DataError(f"message {number} ({turn.role}) is dropped or changed by the template")
        if turn.role != "system":
            seen = at
    if not conversation.tools:
        return
    # The names may be in the user's words too.
    names = [name for tool in conversation.tools for name in _of_tool(tool)]
    if text == without_tools or any(_end_of(name, text) is None for name in names):
        raise DataError(
            "has tools, and the chat template has no place for them",
            hint="use a base whose template takes tools; data.ignore: [tools] trains without them",
        )


def check_turn(turn: Turn, number: int, answer: str, template: ChatTemplate) -> int:
    """Where what `turn` says ends in `answer`, its text; raises `DataError` where a part is not in it."""
    thought, visible = _parts(turn)
    end = 0
    if thought:
        at = _end_of(thought, answer)
        if at is None:
            raise DataError(
                f"message {number} (assistant): its thinking is dropped or changed by the template",
                hint="use a template that shows the thinking of an answer, or take it out of these rows "
                "(a column: data.ignore)",
            )
        end = at
    at = _end_of(visible, answer, end)
    if at is None:
        raise DataError(f"message {number} (assistant) is dropped or changed by the template")
    end = at
    for call in turn.tool_calls:
        if isinstance(call.arguments, Mapping) and call.arguments and str(call.arguments) in answer:
            raise DataError(
                f"message {number} (assistant): the template writes a call's arguments as Python has them, "
                "not as JSON",
                hint="write `arguments | tojson` in chat_template.jinja",
            )
    for piece in _of_calls(turn):
        at = _end_of(piece, answer)
        if at is None:
            raise DataError(
                f"message {number} (assistant) calls a tool, and the template drops or changes the call",
                hint="use a base whose template takes tool_calls, or leave these rows out",
            )
        end = max(end, at)
    return end


def _parts(turn: Turn) -> tuple[str, str]:
    """The thinking and the rest of what a turn says, both stripped."""
    if turn.role != "assistant":
        return "", turn.content.strip()
    if turn.reasoning.strip() or CLOSES not in turn.content:
        return turn.reasoning.strip(), turn.content.strip()
    thought, _, visible = turn.content.rpartition(CLOSES)
    return thought.strip().removeprefix(OPENS).strip(), visible.strip()


def _end_of(piece: str, text: str, start: int = 0) -> int | None:
    """Where `piece` ends in `text`, as it is or as a JSON string; None where it is not there from `start`."""
    if piece.isascii() and piece.isprintable() and '"' not in piece and "\\" not in piece:
        at = text.find(piece, start)
        return at + len(piece) if at >= 0 else None
    forms = {piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1]}
    return min((at + len(form) for form in forms if (at := text.find(form, start)) >= 0), default=None)


def _of_calls(turn: Turn) -> Iterator[str]:
    for call in turn.tool_calls:
        yield call.name
        yield from _leaves(call.arguments)


def _leaves(value: Json) -> Iterator[str]:
    """Keys, texts and numbers in `value`; how a template writes true and null differs."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _of_tool(tool: Mapping[str, Json]) -> Iterator[str]:
    """What a tool's schema says at least: its name, what it does, and its parameters' names."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        return
    yield str(function["name"])
    yield str(function.get("description") or "").strip()
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    yield from properties if isinstance(properties, Mapping) else ()
