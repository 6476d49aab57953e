"""Modelfiles for Ollama: one with a Go TEMPLATE where it is proved, one that uses the GGUF's Jinja.

A Go TEMPLATE is written for templates of the ChatML shape alone, after rendering generated
conversations and finding them equal. Grammar: Ollama's `docs/modelfile.mdx` and `parser/parser.go`
(`#` comments at the start of a line only; a value in triple quotes ends at the first line end after
its closing quotes; characters that Go cannot print are dropped).

Not covered: other shapes of template, tools, thinking.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forge.chat.template import ChatTemplate, Message
from forge.errors import DataError

MODELFILE = "Modelfile"
MODELFILE_JINJA = "Modelfile.jinja"
_USER: Message = {"role": "user", "content": "Hello there"}
_ANSWER: Message = {"role": "assistant", "content": "General greetings."}
_SYSTEM: Message = {"role": "system", "content": "Be brief."}
_NASTY: Message = {"role": "user", "content": 'A {{ .Content }} "quoted" """text"""\n\nand ünïcode'}


def write_modelfiles(
    out: Path, *, file: str, template: ChatTemplate, stops: Sequence[str], context_tokens: int
) -> dict[str, Any]:
    """Write both files into `out`; facts say what could be proved, and why not."""
    head = f"FROM ./{file}\n"
    parameters = "".join(f"PARAMETER stop {_quoted(stop)}\n" for stop in stops)
    parameters += f"PARAMETER num_ctx {context_tokens}\n"
    (out / MODELFILE_JINJA).write_text(f"REQUIRES 0.30\n{head}{parameters}", encoding="utf-8")
    go, reason = chatml_go(template)
    if go is None:
        return {"modelfile": None, "reason": reason, "status": "refused", "stops": list(stops)}
    text = f"{head}TEMPLATE {_quoted(go)}\n{parameters}"
    (out / MODELFILE).write_text(text, encoding="utf-8")
    return {"modelfile": MODELFILE, "reason": None, "status": "exact-with-limits", "stops": list(stops)}


def chatml_go(template: ChatTemplate) -> tuple[str | None, str]:
    """The Go template of a ChatML-shaped Jinja, or None and the reason.

    The shape: every turn is START role newline content END newline, and the prompt ends with
    START assistant newline. START and END are found by rendering; then conversations are compared.
    """
    try:
        prompt = template.render([_USER], add_generation_prompt=True)
    except DataError as error:
        return None, error.message
    start, found, rest = prompt.partition(f"user\n{_USER['content']}")
    end, closing, opening = rest.partition("\n")
    if not (found and closing and start and end and opening == f"{start}assistant\n"):
        return None, "the template is not of the ChatML shape (a Go TEMPLATE is written for that one alone)"
    for messages in _conversations():
        expected = "".join(f"{start}{one['role']}\n{one['content']}{end}\n" for one in messages)
        for prompted in (False, True):
            try:
                rendered = template.render(messages, add_generation_prompt=prompted)
            except DataError as error:
                return None, f"the template refuses a conversation that ChatML allows: {error.message}"
            if rendered != expected + (f"{start}assistant\n" if prompted else ""):
                return None, f"the template differs from plain ChatML: {_shown(rendered)}"
    literals = [
        json.dumps(text, ensure_ascii=False) for text in (start, "\n", f"{end}\n", f"{start}assistant\n")
    ]
    turn = "{{ %s }}{{ .Role }}{{ %s }}{{ .Content }}{{ %s }}" % tuple(literals[:3])  # noqa: UP031 - braces
    return "{{ range .Messages }}" + turn + "{{ end }}{{ " + literals[3] + " }}", ""


def _conversations() -> list[list[Message]]:
    turns = [_USER, _ANSWER, _NASTY, _ANSWER, _USER]
    plain = [turns[:count] for count in (1, 2, 3, 5)]
    edges: list[Message] = [{"role": "user", "content": "  edges \n"}, _ANSWER]
    return [*plain, *([_SYSTEM, *some] for some in plain), edges]


def _shown(text: str) -> str:
    return json.dumps(text[:80], ensure_ascii=False)


def _quoted(text: str) -> str:
    """A Modelfile value; a text with a quote or a line end needs the triple form."""
    if '"' in text or "\n" in text or text.strip() != text:
        return f'"""{text}"""'
    return f'"{text}"'
