"""Somebody's Modelfile beside the model's chat template: the same prompts, the same stops?

TEMPLATE is run as Ollama runs it: with .Messages, or, where it has none, turn by turn with .System, .Prompt
and .Response, the last turn cut where the response goes; SYSTEM goes in front of a conversation that has
none. Prompts are compared on generated conversations; a difference is shown in its smallest form.

Not covered: templates that need more of Go than `go_interpreter` runs (said so, never guessed);
MESSAGE, which is a part of every conversation and said to be there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from forge.chat import go_interpreter
from forge.chat.format import infer
from forge.chat.format_check import CompiledTemplate, check_format
from forge.chat.hand_over import HandOver
from forge.chat.modelfile import Modelfile
from forge.chat.probe import Conversation
from forge.errors import Problem

_TURN = {"system": "System", "user": "Prompt", "assistant": "Response"}
# What a turn may not hold already when a message of this role comes.
_CLOSES = {"system": ("Prompt", "Response"), "user": ("Response",), "assistant": ()}
_NOTHING = {
    "Tools": (), "Think": False, "ThinkLevel": "", "IsThinkSet": False, "Suffix": "", "Response": "",
}  # fmt: skip
_NO_MORE = {"Thinking": "", "ToolCalls": (), "Images": (), "ToolName": "", "ToolCallID": ""}


@dataclass(frozen=True)
class Checked:
    """`prompts` is None without a TEMPLATE; `problems` are empty where all is as it should be."""

    prompts: CompiledTemplate | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def check_modelfile(modelfile: Modelfile, handed: HandOver) -> Checked:
    """Compare; raises `GoTemplateError` for a TEMPLATE that cannot be run here, `NotInferredError` for a
    chat template that says nothing a TEMPLATE could be held against."""
    problems, notes = [], list(modelfile.notes)
    missing = [stop for stop in handed.stops if stop not in modelfile.stops]
    if missing:
        problems.append(Problem(f"no PARAMETER stop for {', '.join(missing)}: a reply may not end", "stops"))
    if modelfile.messages:
        notes.append(f"{len(modelfile.messages)} MESSAGEs stand in front of every conversation")
    if modelfile.renderer or modelfile.parser:
        notes.append("RENDERER and PARSER are the server's own code: nothing is said of them")
    prompts = None
    if modelfile.template is not None:
        render = as_ollama(modelfile)
        chat = infer(handed.template)
        prompts = check_format(
            handed.template, chat, modelfile.template, add_bos=handed.add_bos, render=render
        )
        if prompts.reason:
            problems.append(Problem(prompts.reason, "TEMPLATE"))
        if handed.add_bos and handed.bos and modelfile.template.lstrip().startswith(handed.bos):
            problems.append(
                Problem(f"it begins with {handed.bos}, which the tokenizer writes too", "TEMPLATE")
            )
    else:
        notes.append("no TEMPLATE: the server takes the GGUF's own, or one that it finds likely")
    return Checked(prompts, tuple(problems), tuple(notes))


def as_ollama(modelfile: Modelfile) -> Callable[[Conversation], str]:
    """How the server writes a conversation with this Modelfile."""
    source = modelfile.template or ""
    render = _by_messages(source) if ".Messages" in source else _by_turns(source)

    def run(conversation: Conversation) -> str:
        messages = [dict(message) for message in conversation]
        if modelfile.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": modelfile.system})
        return render(messages)

    return run


def _by_messages(source: str) -> Callable[[list[dict[str, str]]], str]:
    template = go_interpreter.parse_go(source)

    def render(messages: list[dict[str, str]]) -> str:
        listed = tuple({"Role": turn["role"], "Content": turn["content"], **_NO_MORE} for turn in messages)
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        return template.run({**_NOTHING, "Messages": listed, "System": system})

    return render


def _by_turns(source: str) -> Callable[[list[dict[str, str]]], str]:
    """Templates of old: one run for each turn."""
    source = source if ".Response" in source else source + "{{ .Response }}"
    whole = go_interpreter.parse_go(source)
    last = go_interpreter.parse_go(source, cut_after=".Response")

    def render(messages: list[dict[str, str]]) -> str:
        written, turn = [], dict.fromkeys(_TURN.values(), "")
        for message in messages:
            if any(turn[name] for name in _CLOSES[message["role"]]):
                written.append(whole.run({**_NOTHING, **turn}))
                turn = dict.fromkeys(turn, "")
            turn[_TURN[message["role"]]] = message["content"]
        return "".join([*written, last.run({**_NOTHING, **turn})])

    return render
