"""What stands in front of every conversation, as a part of its chat template.

A server renders the template that the GGUF carries, so whatever is to be the same everywhere is written
there: it is trained with, it is in the prompts that are compared, and no server needs a setting for it.
Not covered: a template that takes neither system messages nor exchanges; `refuse_unwritten` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from forge.chat.template import ChatTemplate
from forge.errors import DataError, RecipeError

_NO_SYSTEM = "not messages or messages[0]['role'] != 'system'"


def with_beginning(source: str, system: str | None, messages: Sequence[Mapping[str, str]]) -> str:
    """The template that has the system prompt where a conversation has none, then the example `messages`.

    One that begins so already, as that of an adapter which was trained with it, is left as it is.
    """
    lines = []
    if system:
        turn = _literal([{"role": "system", "content": system}])
        lines.append(f"{{% if {_NO_SYSTEM} %}}{{% set messages = {turn} + messages %}}{{% endif %}}")
    if messages:
        turns = _literal([{"role": message["role"], "content": message["content"]} for message in messages])
        lines.append(
            f"{{% if {_NO_SYSTEM} %}}{{% set messages = {turns} + messages %}}"
            f"{{% else %}}{{% set messages = [messages[0]] + {turns} + messages[1:] %}}{{% endif %}}"
        )
    # A line end after a block is dropped (trim_blocks), and the template still begins a line.
    beginning = "".join(line + "\n" for line in lines)
    return source if source.startswith(beginning) else beginning + source


def refuse_unwritten(
    template: ChatTemplate, system: str | None, messages: Sequence[Mapping[str, str]]
) -> None:
    """Raise `RecipeError` where the template does not write what is to stand in front."""
    parts = {
        "model.system": [system] if system else [],
        "model.messages": [message["content"] for message in messages],
    }
    question = [{"role": "user", "content": "Hello!"}]
    try:
        prompt = template.render(question, add_generation_prompt=True)
    except DataError as refusal:
        field = next(name for name, texts in parts.items() if texts)
        raise RecipeError(
            f"{field}: the base's chat template refuses it: {refusal.message}", hint=_OTHERWISE
        ) from refusal
    for field, texts in parts.items():
        for text in texts:
            if text.strip() not in prompt:
                raise RecipeError(
                    f"{field}: the base's chat template does not write it: {text[:60]!r}", hint=_OTHERWISE
                )


_OTHERWISE = "leave it out, or name a template that does: base: {id: ..., chat_template: chatml}"


def _literal(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
