"""A chat template to a Go template that is never wrong: exact, exact with limits, or refused.

The format is inferred, written as Go, and that very text is run (`go_interpreter`) on every
conversation of `probe` and compared with the Jinja. A difference becomes a limit only if a property of
the conversation explains it: white space at the edges of a text, an empty text, a mark that the
template's source looks for, a role that it refuses. Otherwise the template is refused, with
the smallest conversation that shows why. Several turns of edge-trimmed text, with a system message
where the template takes one, are never in a limit.

The conversations claimed: an optional system message, then user and assistant in turn, the user last.
Not covered: tools, images, thinking; neighbours of one role, which Ollama merges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from forge.chat import go_interpreter, probe
from forge.chat.difference import first_difference
from forge.chat.format import ChatFormat, NotInferredError, infer
from forge.chat.go_template import to_go
from forge.chat.probe import Conversation, Limit
from forge.chat.template import ChatTemplate
from forge.errors import DataError

Status = Literal["exact", "exact-with-limits", "refused"]
NO_SYSTEM = "a system message"
# What no status speaks of, `exact` neither.
NOT_CLAIMED = (
    "tools", "thinking", "messages of other roles than system, user and assistant",
    "two messages of one role in a row (Ollama merges them)",
    "a system message that is not the first, a conversation that the user does not begin and end",
)  # fmt: skip
# More than this and nobody could say what is claimed.
_MOST_LIMITS = 40
_SHOWN = 60
_HELLO: Conversation = ({"role": "user", "content": "Hello!"},)


@dataclass(frozen=True)
class CompiledTemplate:
    """The answer: `go` is None when refused; `reason` is then a sentence for the user.

    `stops` end a reply; `checked` counts the conversations compared. `limits` are checked predicates.
    """

    status: Status
    go: str | None = None
    reason: str | None = None
    limits: tuple[Limit, ...] = ()
    checked: int = 0
    chat: ChatFormat | None = field(default=None, repr=False)

    @property
    def stops(self) -> tuple[str, ...]:
        return self.chat.stops if self.chat else ()

    def claims(self, conversation: Conversation) -> bool:
        """Whether the Go text is claimed to be right for `conversation`; `NOT_CLAIMED` never is."""
        if self.go is None or not probe.is_ordinary(conversation):
            return False
        return not any(limit.holds(conversation) for limit in self.limits)


def compile_template(template: ChatTemplate, *, add_bos: bool) -> CompiledTemplate:
    """Infer, write and check; raises `TemplateLimitError` for a template that runs into a limit."""
    try:
        chat = infer(template)
        return check_format(template, chat, to_go(chat, add_bos=add_bos), add_bos=add_bos)
    except NotInferredError as error:
        return CompiledTemplate("refused", reason=error.message)


def check_format(
    template: ChatTemplate,
    chat: ChatFormat,
    go: str,
    *,
    add_bos: bool,
    render: Callable[[Conversation], str] | None = None,
) -> CompiledTemplate:
    """Compare `go` with the template on generated conversations.

    `render` runs it where it takes more than the messages (`modelfile_check`).
    """
    if reason := unseen_bos(template, add_bos=add_bos):
        return CompiledTemplate("refused", reason=reason, chat=chat)
    literals, counts = probe.literals(template), probe.counts(template)
    takes_system = chat.system != "refused"
    comparison = _Comparison(template, render or go_interpreter.parse_go(go).render, add_bos)
    limits = [] if takes_system else [Limit(NO_SYSTEM, _has_system)]
    checked = 0
    for conversation in probe.conversations(literals, has_system=takes_system, counts=counts):
        checked += 1
        if any(limit.holds(conversation) for limit in limits) or not comparison.differs(conversation):
            continue
        smallest = probe.shrink(conversation, lambda talk: _unexplained(talk, limits, comparison))
        unlike = probe.limits_of(smallest, literals, counts)
        if not unlike or len(limits) == _MOST_LIMITS:
            return CompiledTemplate("refused", reason=comparison.shown(smallest), checked=checked, chat=chat)
        limits.append(unlike[0])
    status: Status = "exact-with-limits" if limits else "exact"
    return CompiledTemplate(status, go, None, tuple(limits), checked, chat)


def unseen_bos(template: ChatTemplate, *, add_bos: bool) -> str:
    """Why the tokens cannot be right: the tokenizer writes a BOS that the template does not; else empty."""
    bos = template.special_tokens.get("bos_token", "")
    try:
        text = template.render(_HELLO, add_generation_prompt=True)
    except DataError:
        return ""
    if not (add_bos and bos) or text.startswith(bos):
        return ""
    return (
        f"the tokenizer writes {bos} in front of every prompt and the chat template does not, so that a "
        "server gives the model a token that training by the template never saw"
    )


def limit_names(limits: Sequence[Limit]) -> list[str]:
    """The limits in words; what holds for every role is said once."""
    names = [limit.name for limit in limits]
    parts = []
    for name in names:
        general = {name.replace(f"{role} ", "", 1) for role in probe.ROLES if f"{role} " in name}
        shared = [name for name in general if all(_of_role(name, role) in names for role in probe.ROLES)]
        parts.append(shared[0] if shared else name)
    return list(dict.fromkeys(parts))


def _of_role(general: str, role: str) -> str:
    return f"an empty {role} message" if general == "an empty message" else f"{role} {general}"


def _has_system(conversation: Conversation) -> bool:
    return any(message["role"] == "system" for message in conversation)


def _unexplained(conversation: Conversation, limits: Sequence[Limit], comparison: _Comparison) -> bool:
    return not any(limit.holds(conversation) for limit in limits) and comparison.differs(conversation)


class _Comparison:
    """One template beside its Go text."""

    def __init__(self, template: ChatTemplate, written: Callable[[Conversation], str], add_bos: bool) -> None:
        self.template = template
        self.written = written
        self.bos = template.special_tokens.get("bos_token", "") if add_bos else ""

    def expected(self, conversation: Conversation) -> str | None:
        """What the model should be given; None where the template refuses."""
        try:
            return self.template.render(conversation, add_generation_prompt=True)
        except DataError:
            return None

    def served(self, conversation: Conversation) -> str:
        """What it is given: the tokenizer's BOS is a part of it."""
        return self.bos + self.written(conversation)

    def differs(self, conversation: Conversation) -> bool:
        return self.served(conversation) != self.expected(conversation)

    def shown(self, conversation: Conversation) -> str:
        """The counter-example in words."""
        turns = ", ".join(f"{message['role']} {_short(message['content'])}" for message in conversation)
        expected, written = self.expected(conversation), self.served(conversation)
        if expected is None:
            return f"it refuses some conversations that are not special in any way: {turns}"
        at = max(0, first_difference(expected, written) - 10)
        there = f"{_short(expected[at:])}, where its turns elsewhere lead to {_short(written[at:])}"
        return f"its prompts do not follow from the messages' roles and places: for {turns} it writes {there}"


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= _SHOWN else text[:_SHOWN] + "…", ensure_ascii=False)
