"""How the fake Ollama writes a prompt: the same choice of template and the same data as the real one.

Rules and order are those measured on a live server 0.33; one test each in `test_fake_ollama`. Jinja is the
real one with what the server sets by itself (thinking on, today's date); Go is forge's interpreter,
or real Go where a test gives it.

Not covered: native renderers (one is named, and changes nothing), images; in which order a real server writes
the keys of a tool's schema, and what it makes of calls: they go to the Jinja as they come.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from forge.chat import go_interpreter
from forge.chat.template import DAY_VARIABLE, ChatTemplate
from tests.makers.tokenizer import CHATML

Messages = Sequence[Mapping[str, Any]]
# Go template text and its data -> text.
GoRenderer = Callable[[str, Mapping[str, Any]], str]
CHATML_GO = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
# Jinja that the server knows -> the Go that it puts in its place, and the stops that it adds.
KNOWN: tuple[tuple[str, str, tuple[str, ...]], ...] = ((CHATML, CHATML_GO, ("<|im_start|>", "<|im_end|>")),)
_NEAR = 100


@dataclass
class Model:
    """A model as the server keeps it. `jinja`, `tokens` and `add_bos` are read from its GGUF."""

    blob: str
    jinja: str | None
    tokens: Mapping[str, str]
    add_bos: bool
    architecture: str
    template: str | None = None
    system: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[Mapping[str, str]] = field(default_factory=list)
    licences: list[str] = field(default_factory=list)
    adapter: str | None = None
    adapter_architecture: str | None = None
    renderer: str | None = None

    @property
    def uses_jinja(self) -> bool:
        return self.jinja is not None and (self.template is None or self.has_more_than_go)

    @property
    def jinja_can(self) -> set[str]:
        """What its Jinja is taken to know: words are looked for, remarks included."""
        jinja = self.jinja or ""
        can = {"tools"} if any(word in jinja for word in ("tools", "tool_call")) else set()
        cuts = any(f"content.split({mark}</think>{mark})" in jinja for mark in "'\"")
        cuts &= not any(word in jinja for word in ("reasoning_content", "<SPECIAL_12>"))
        return can | ({"thinking"} if cuts or all(tag in jinja for tag in ("<think>", "</think>")) else set())

    @property
    def has_more_than_go(self) -> bool:
        """Whether an explicit TEMPLATE is ignored. Not covered: Go that knows tools or thinking."""
        return bool(self.jinja_can)

    def detect(self) -> None:
        """A Jinja near to a known one brings its Go template, unless one was given, and its stops."""
        for known, go, stops in KNOWN:
            if self.jinja is not None and is_near(self.jinja, known):
                self.template = self.template or go
                self.parameters.setdefault("stop", list(stops))
                return


def is_near(one: str, other: str) -> bool:
    """Whether fewer than 100 edits lie between them (Levenshtein)."""
    if abs(len(one) - len(other)) >= _NEAR:
        return False
    row = list(range(len(other) + 1))
    for number, left in enumerate(one, 1):
        above, row[0] = row[0], number
        for at, right in enumerate(other, 1):
            above, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, above + (left != right))
        if min(row) >= _NEAR:
            return False
    return row[-1] < _NEAR


def collate(model: Model, messages: Messages) -> tuple[str, list[dict[str, Any]]]:
    """The system text, and the messages with neighbours of one role merged (not those of tools)."""
    merged: list[dict[str, Any]] = []
    for message in _in_front(model, messages):
        if merged and merged[-1]["role"] == message["role"] != "tool":
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append(dict(message))
    return "\n\n".join(one["content"] for one in merged if one["role"] == "system"), merged


def _in_front(model: Model, messages: Messages) -> list[Mapping[str, Any]]:
    """The messages behind the model's own."""
    whole = [*model.messages, *messages]
    if model.system and messages[0]["role"] != "system":
        whole.insert(0, {"role": "system", "content": model.system})
    return whole


def prompt_of(
    model: Model,
    messages: Messages,
    go: GoRenderer,
    *,
    has_jinja: bool,
    honours_go: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text that goes to the tokenizer; `honours_go` is OLLAMA_GO_TEMPLATE=1."""
    system, merged = collate(model, messages)
    if has_jinja and (model.template is None or (model.has_more_than_go and not honours_go)):
        return _of_jinja(model, _in_front(model, messages), tools)
    template = model.template or "{{ .Prompt }}"
    if ".Messages" not in template:
        text = _legacy(template, merged, go)
    else:
        text = go(template, {"System": system, "Messages": merged, "Response": ""})
    return text.removeprefix("<bos>") if model.add_bos else text


def _of_jinja(model: Model, messages: Messages, tools: Sequence[Mapping[str, Any]]) -> str:
    """llama-server's way: no message is merged; ChatML where there is none; one BOS, whoever writes it."""
    names = {"thinking": "reasoning_content", "tool_name": "name"}
    messages = [{names.get(key, key): value for key, value in one.items()} for one in messages]
    source = model.jinja if model.jinja is not None else CHATML
    today = datetime.now(UTC).date().isoformat()
    given = {DAY_VARIABLE: today, "enable_thinking": True, "date_string": today}
    template = ChatTemplate(source, model.tokens, given)
    text = template.render(messages, add_generation_prompt=True, tools=tools)
    return text.removeprefix(model.tokens.get("bos_token", "")) if model.add_bos else text


def _legacy(template: str, messages: Messages, go: GoRenderer) -> str:
    """Templates without .Messages run once a turn; the last run ends where the response goes."""
    if ".Response" not in template:
        template += "{{ .Response }}"
    written, turn = [], {"System": "", "Prompt": "", "Response": ""}
    names = {"system": "System", "user": "Prompt", "assistant": "Response"}
    closes = {"system": ("Prompt", "Response"), "user": ("Response",), "assistant": ()}
    for message in messages:
        if any(turn[name] for name in closes[message["role"]]):
            written.append(go(template, turn))
            turn = dict.fromkeys(turn, "")
        turn[names[message["role"]]] = message["content"]
    cut = re.split(r"\{\{-?\s*\.Response\s*-?\}\}", template)[0]
    return "".join([*written, go(cut, turn)])


def by_interpreter(template: str, data: Mapping[str, Any]) -> str:
    """forge's own subset, which knows .Messages alone."""
    return go_interpreter.parse_go(template).render(data["Messages"])
