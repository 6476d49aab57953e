"""Which conversations an import into Ollama compares, and what it leaves out.

Those that people have choose the way; odd ones, with texts that hardly anybody writes, are compared beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forge.chat import probe
from forge.chat.format_check import NOT_CLAIMED, limit_names
from forge.chat.hand_over import HandOver, Way
from forge.chat.template import ChatTemplate
from forge.errors import CheckError, DataError
from forge.serve.endpoint import Message

# How many generated conversations are compared: the plain ones, and others from all over.
PLAIN, _ODD = 12, 36

# Prompts -> how many tokens each has.
Count = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class Chosen:
    """The conversations to compare: those that people have, and odd ones, which choose no way.

    `left_out` says what is not compared.
    """

    usual: Sequence[tuple[Message, ...]]
    odd: Sequence[tuple[Message, ...]]
    left_out: tuple[str, ...]


def choose(handed: HandOver, way: Way, count: Count | None = None) -> Chosen:
    """Generated conversations of those that the template takes; on the Go way those that are claimed.

    A conversation fits into the context by its bytes, or by `count` of its tokens.
    """
    takes_system = handed.compiled.chat is None or handed.compiled.chat.system != "refused"
    limits = handed.compiled.limits if way == "go" else ()
    left: dict[str, None] = {} if takes_system else {"a system message, which the template refuses": None}
    taken = []
    for talk in probe.conversations(probe.literals(handed.template), has_system=takes_system):
        if not probe.is_ordinary(talk):
            left[NOT_CLAIMED[-1]] = None
        elif not all(message["content"].strip() for message in talk):
            left["an empty message, which the server drops"] = None
        elif any(limit.holds(talk) for limit in limits):
            left |= dict.fromkeys(limit_names(limits))
        elif not _takes(handed.template, talk):
            left["conversations that the template refuses"] = None
        elif way == "jinja" or handed.compiled.claims(talk):
            taken.append(talk)
    if not taken:
        raise CheckError(
            "the chat template takes none of the generated conversations: nothing would be proved",
            hint="forge template shows what it takes",
        )
    fitting = _fitting(handed, taken, count)
    if len(fitting) < len(taken):
        left[f"conversations that do not surely fit into {handed.context_tokens} tokens"] = None
    tokens = [token for token in handed.template.special_tokens.values() if token]
    usual = [talk for talk in fitting if all(_is_usual(message["content"], tokens) for message in talk)]
    odd = [talk for talk in fitting if talk not in usual]
    plain, others = usual[:PLAIN], usual[PLAIN:]
    if not usual:
        plain, odd = odd, []
    return Chosen(
        [*plain, *others[:: max(1, len(others) // _ODD)]], odd[:: max(1, len(odd) // PLAIN)], tuple(left)
    )


def _fitting(
    handed: HandOver, taken: Sequence[tuple[Message, ...]], count: Count | None
) -> list[tuple[Message, ...]]:
    """Those that the server would not cut; raises `CheckError` where there are none."""
    size = {id(talk): len(_prompt(handed, talk).encode()) for talk in taken}
    if any(bytes >= handed.context_tokens for bytes in size.values()) and count:
        long = [talk for talk in taken if size[id(talk)] >= handed.context_tokens]
        for talk, tokens in zip(long, count([_prompt(handed, talk) for talk in long]), strict=False):
            size[id(talk)] = tokens
    fitting = [talk for talk in taken if size[id(talk)] < handed.context_tokens]
    if not fitting:
        raise CheckError(
            f"no conversation surely fits into a context of {handed.context_tokens} tokens, the shortest has "
            f"{min(size.values()):,} {'tokens' if count else 'bytes'}: nothing would be proved",
            hint="give it more: deploy.context_tokens in the recipe, or num_ctx in its Modelfile",
        )
    return fitting


def _prompt(handed: HandOver, messages: Sequence[Message]) -> str:
    return handed.template.render(messages, add_generation_prompt=True)


def _is_usual(content: str, tokens: Sequence[str]) -> bool:
    """Whether people write it.

    llama.cpp leaves a no-break space at an edge, where Python's trim takes it, and servers differ in what
    they do with a special token in a text: neither speaks against the better way.
    """
    is_trimmed_alike = content.strip() == content.strip(" \t\r\n\f\v")
    return is_trimmed_alike and not any(token in content for token in tokens)


def _takes(template: ChatTemplate, messages: Sequence[Message]) -> bool:
    try:
        template.render(messages, add_generation_prompt=True)
    except DataError:
        return False
    return True
