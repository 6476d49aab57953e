"""A model's chat template, rendered exactly as transformers renders it, with its variables pinned.

It is parsed here, and rendered in a process with hard limits (`renderer`): it is somebody else's program.

Not covered: documents are passed as None.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils

from forge.chat import renderer
from forge.chat.jinja import environment_of
from forge.chat.render_process import Prompts
from forge.errors import DataError

Message = Mapping[str, Any]
"""`role` and `content`, and what else a template may read (`tool_calls`, `reasoning_content`)."""

# The day that Llama's own templates fall back to; any fixed day would do.
DEFAULT_DAY = "2024-07-26"
DAY_VARIABLE = "today"
# A name that no server and no template sets.
_UNSET = "forge_leaves_this_undefined"
# Ollama replaces a template that differs by fewer than 100 edits from one that it knows (ChatML with renamed
# tokens, Gemma-2) by its own. With a remark of this length none is so near.
_REMARK = (
    "This is the chat template that the model was trained with. The lines before it fix what it reads "
    "besides the messages, as training had it: a server would otherwise fill in a date or a way of "
    "thinking of its own. This remark writes nothing into a prompt. It is as long as it is because some "
    "servers guess by likeness which template a model has, and then prompt it with another one that only "
    "looks much the same."
)
_GUARD = f"{{# {_REMARK} #}}"

# What a template is given anyway; everything else it reads is a variable of the prompt contract.
_GIVEN = {
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token",
    "pad_token", "raise_exception", "strftime_now", "dict", "namespace", "range", "lipsum", "cycler",
    "joiner", "continue_final_message", _UNSET,
}  # fmt: skip


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the special tokens and the variables that it is given.

    `variables` are fixed for the model's whole life: the same at training, export and serving.
    `today` (ISO date) is what `strftime_now` gives.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.syntax()

    @property
    def day(self) -> str:
        return str(self.variables.get(DAY_VARIABLE, DEFAULT_DAY))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt text; `tools` are JSON schemas, as OpenAI's API has them.

        Raises `DataError` with the template's own words when it refuses, `TemplateLimitError` when it takes
        more time or memory than any chat template needs.
        """
        prompts = Prompts(messages, tools, ((len(messages), add_generation_prompt),))
        ((text,),) = self.render_all([prompts])
        if isinstance(text, DataError):
            raise text
        return text

    def as_read(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, with the thinking by the name that the template reads it by (gpt-oss: `thinking`)."""
        if ".thinking" not in self.source:
            return messages
        return [
            {**message, "thinking": message["reasoning_content"]}
            if message.get("reasoning_content")
            else message
            for message in messages
        ]

    def render_all(self, prompts: Sequence[Prompts]) -> list[list[str | DataError]]:
        """The texts of many prompts at once, or the refusal of one; raises `TemplateLimitError`."""
        variables = {name: value for name, value in self.variables.items() if name != DAY_VARIABLE}
        values = {"documents": None, **self.special_tokens, **variables}
        return renderer.render(self.source, self.day, values, prompts)

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Those of the variables that it reads."""
        return frozenset(self.variables_read())

    def variables_read(self) -> tuple[str, ...]:
        """Names that the template reads beyond what every template is given."""
        try:
            return tuple(sorted(jinja2.meta.find_undeclared_variables(self.syntax()) - _GIVEN))
        except RecursionError as error:
            raise DataError("the chat template is not valid Jinja: nested too deep") from error

    def syntax(self) -> jinja2.nodes.Template:
        """The template's syntax tree; raises `DataError` where it is not valid Jinja."""
        hint = "fix chat_template.jinja in the base's directory"
        try:
            environment = environment_of(self.day)
        except ValueError as error:
            raise DataError(
                f"template variable {DAY_VARIABLE}: {self.day!r} is not a date",
                hint="write it as 2026-01-31",
            ) from error
        try:
            return environment.parse(self.source)
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}", hint=hint
            ) from error
        except RecursionError as error:
            raise DataError("the chat template is not valid Jinja: nested too deep", hint=hint) from error

    @property
    def is_pinned(self) -> bool:
        """Whether it is a `pinned_source`."""
        return self.source.startswith(_GUARD)

    def pinned_source(self) -> str:
        """The template with its variables written in front, for servers that would set their own.

        A server that renders this text (llama-server, Ollama, transformers) gives the prompt of
        training whatever thinking mode or date it would have chosen: what training left undefined
        is made undefined again, by giving it the value of a name that nobody sets.
        """
        variables = {name: value for name, value in self.variables.items() if name != DAY_VARIABLE}
        values = dict.fromkeys(self.variables_read(), _UNSET)
        values |= {name: _literal(value) for name, value in variables.items()}
        pins = [f"{{% set {name} = {value} %}}" for name, value in sorted(values.items())]
        if "strftime_now" in self.source:
            pins.append(self._pinned_clock())
        # A line end after each block is dropped (trim_blocks), and the template still begins a line.
        return "".join(pin + "\n" for pin in (_GUARD, *pins)) + self.source

    def _pinned_clock(self) -> str:
        formats = sorted(_literal_arguments(self.syntax(), "strftime_now"))
        pinned = date.fromisoformat(self.day)
        branches = "".join(
            f"{{% if format == {_literal(form)} %}}{{{{ {_literal(pinned.strftime(form))} }}}}{{% endif %}}"
            for form in formats
        )
        return f"{{% macro strftime_now(format) %}}{branches}{{% endmacro %}}"


def _literal(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False)


def _literal_arguments(syntax: jinja2.nodes.Template, function: str) -> set[str]:
    """The constant first arguments with which `function` is called; others cannot be pinned."""
    names: set[str] = set()
    for call in syntax.find_all(jinja2.nodes.Call):
        if isinstance(call.node, jinja2.nodes.Name) and call.node.name == function:
            if not (call.args and isinstance(call.args[0], jinja2.nodes.Const)):
                raise DataError(
                    f"the chat template calls {function} with a computed format, which cannot be pinned",
                    hint="replace the call in chat_template.jinja by the text you want",
                )
            names.add(str(call.args[0].value))
    return names
