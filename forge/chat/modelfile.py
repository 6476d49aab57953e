"""Modelfiles for Ollama: one with a Go TEMPLATE where it is proved, one that uses the GGUF's Jinja.

A Go TEMPLATE is written where `format_check` proved it on generated conversations. Grammar: Ollama's
`docs/modelfile.mdx` and `parser/parser.go` (`#` comments at the start of a line only; a value in
triple quotes ends at the first line end after its closing quotes; characters that Go cannot print
are dropped).

Not covered: tools, thinking.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forge.chat.format_check import compile_template, limit_names
from forge.chat.template import ChatTemplate

MODELFILE = "Modelfile"
MODELFILE_JINJA = "Modelfile.jinja"


def write_modelfiles(
    out: Path,
    *,
    file: str,
    template: ChatTemplate,
    stops: Sequence[str],
    context_tokens: int,
    add_bos: bool = True,
) -> dict[str, Any]:
    """Write both files into `out`; facts say what could be proved, and why not.

    `add_bos`: whether the GGUF's tokenizer writes BOS by itself, so that TEMPLATE must not.
    """
    head = f"FROM ./{file}\n"
    parameters = "".join(f"PARAMETER stop {_quoted(stop)}\n" for stop in stops)
    parameters += f"PARAMETER num_ctx {context_tokens}\n"
    (out / MODELFILE_JINJA).write_text(f"REQUIRES 0.30\n{head}{parameters}", encoding="utf-8")
    found = compile_template(template, add_bos=add_bos)
    facts = {"status": found.status, "stops": list(stops), "limits": limit_names(found.limits)}
    if found.go is None:
        reason = f"no Go TEMPLATE says what the chat template does: {found.reason}"
        return {"modelfile": None, "reason": reason, **facts}
    text = f"{head}TEMPLATE {_quoted(found.go)}\n{parameters}"
    (out / MODELFILE).write_text(text, encoding="utf-8")
    return {"modelfile": MODELFILE, "reason": None, **facts}


def _quoted(text: str) -> str:
    """A Modelfile value; a text with a quote or a line end needs the triple form."""
    if '"' in text or "\n" in text or text.strip() != text:
        return f'"""{text}"""'
    return f'"{text}"'
