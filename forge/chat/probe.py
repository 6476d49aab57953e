"""Conversations to check a chat format on, the limits that it may have, and smallest counter-examples.

The conversations: with and without system, one to six turns, and texts chosen to upset a template:
empty, with white space at the edges, Unicode, braces, quotes, role words, long; every literal that the
template's own source compares or splits text by, and every number that it may count messages or
characters to, since these are the places where a text can change what a template does.

Not covered: numbers over 5,000 in a template's source; tools, images; neighbours of one role, which
Ollama merges before any template sees them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jinja2.nodes

from forge.chat.template import ChatTemplate, Message

Conversation = tuple[Message, ...]
ROLES = ("system", "user", "assistant")
_RANDOM_CONVERSATIONS = 60
_LONGEST_LITERAL = 120
# Numbers in a template's source up to which it is followed, as a text's length and as messages.
_HIGHEST, _MOST_MESSAGES = 5000, 200
# What may be outside of a proof: texts so long, and more messages than six turns with a system message.
_LONG_TEXT, _SEVERAL = 200, 12
_ODD_TEXTS = (
    "", " ", "\n", " before", "after ", "\n\nbefore", "after\n", "\tboth\t", "\u00a0hard space\u00a0",
    "{{ .Content }}", "{{ x }} {% if y %} {# z #}", "}} {{- end -}}", '"""', 'a "quoted" word \\ \\n `tick`',
    "first line\nsecond line\n\nfourth line", "carriage\r\nreturn", "tab\tinside",
    "ünïcödé 漢字 🙂 \u200b\u2028 e\u0301", "user", "assistant", "system", "user: hello\nassistant: hi",
    "<b>&amp; it's</b>", "0", "None", "%s {0} $1", "word " * 200 + "end",
)  # fmt: skip
# Three characters with a sign that prose lacks, or words that nobody writes together by chance.
_TELLING = re.compile(r"(?s)^(?=.{3}).*[^\w\s.,;:?!'-]|.{5,}\s.{4,}")
_PLAIN = {
    "system": "Answer in few words.",
    "user": "What is in this sandwich?",
    "assistant": "There is bacon in it.",
}


@dataclass(frozen=True)
class Limit:
    """A property of conversations for which nothing is claimed."""

    name: str
    holds: Callable[[Conversation], bool]


def conversation(texts: Sequence[str], *, system: str | None = None, starts: str = "user") -> Conversation:
    """`texts` by turns, the first one said by `starts`."""
    roles = ("user", "assistant") if starts == "user" else ("assistant", "user")
    turns = [_message(roles[number % 2], text) for number, text in enumerate(texts)]
    return (*([_message("system", system)] if system is not None else []), *turns)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def literals(template: ChatTemplate) -> tuple[str, ...]:
    """Texts that the template's source may look for in a message, and its special tokens."""
    syntax = template.syntax()
    keys = {id(item.arg) for item in syntax.find_all(jinja2.nodes.Getitem)}
    texts = [
        constant.value
        for constant in syntax.find_all(jinja2.nodes.Const)
        if isinstance(constant.value, str) and id(constant) not in keys
    ]
    texts += [token for token in template.special_tokens.values() if token]
    return tuple(sorted({text for text in texts if text.strip() and len(text) <= _LONGEST_LITERAL}))


def counts(template: ChatTemplate) -> tuple[int, ...]:
    """Whole numbers in the template's source, to which it may count messages or characters."""
    values = (constant.value for constant in template.syntax().find_all(jinja2.nodes.Const))
    numbers = {abs(value) for value in values if type(value) is int}
    return tuple(sorted(number for number in numbers if 1 < number <= _HIGHEST))


def conversations(
    literals: Sequence[str], *, has_system: bool, seed: int = 0, counts: Sequence[int] = ()
) -> Iterator[Conversation]:
    """Every conversation to check, the plain ones first; `literals` are the template's.

    `counts` are its numbers: there are texts and conversations just as long, and just longer.
    """
    systems = [None, _PLAIN["system"]] if has_system else [None]
    for system in systems:
        for turns in range(1, 7):
            yield _plain(turns, system)
    for text in _ODD_TEXTS:
        for system in systems:
            yield from _with_odd_text(text, system)
    for literal in literals:
        yield from _with_odd_text(f"before {literal} after", systems[-1])
        yield from _with_odd_text(f"{literal} amid {literal}", None)
    for number in counts:
        yield from _as_long(number, systems)
    for system in systems:
        yield conversation([_PLAIN["assistant"], _PLAIN["user"]], system=system, starts="assistant")
    if has_system:
        yield (*_plain(1, None), _message("assistant", "Yes."), *_plain(2, _PLAIN["system"]))
    yield from _random([*_ODD_TEXTS, *literals], has_system, seed)


def _as_long(number: int, systems: Sequence[str | None]) -> Iterator[Conversation]:
    """Texts of about `number` characters; conversations of about so many messages."""
    for length in (number, number + 1):
        yield from _with_odd_text(("word " * length)[: length - 1] + "x", systems[-1])
    if number <= _MOST_MESSAGES:
        for system in systems:
            yield from (_plain(number // 2 + more, system) for more in range(1, 4))


def _plain(turns: int, system: str | None) -> Conversation:
    texts = [f"{_PLAIN[('user', 'assistant')[number % 2]]} ({number})" for number in range(2 * turns - 1)]
    return conversation(texts, system=system)


def _with_odd_text(text: str, system: str | None) -> Iterator[Conversation]:
    """`text` for each role, in otherwise plain conversations."""
    yield conversation([text, "Yes.", "And now?"], system=system)
    yield conversation(["Hello", text, "And now?"], system=system)
    yield conversation(["Hello", "Yes.", text], system=system)
    if system is not None:
        yield conversation(["Hello"], system=text)
        yield conversation(["Hello", "Yes.", "And now?"], system=text)


def _random(odd: Sequence[str], has_system: bool, seed: int) -> Iterator[Conversation]:
    chance = random.Random(seed)
    for _ in range(_RANDOM_CONVERSATIONS):
        count = 2 * chance.randint(1, 6) - 1
        texts = [_random_text(odd, chance) for _ in range(count)]
        system = _random_text(odd, chance) if has_system and chance.random() < 0.6 else None
        yield conversation(texts, system=system)


def _random_text(odd: Sequence[str], chance: random.Random) -> str:
    pieces = [chance.choice(odd) if chance.random() < 0.3 else chance.choice(list(_PLAIN.values()))]
    while chance.random() < 0.4:
        pieces.append(chance.choice(odd) if chance.random() < 0.3 else chance.choice("abc 12.,;\n"))
    return "".join(pieces)


def limits_of(talk: Conversation, literals: Sequence[str], counts: Sequence[int] = ()) -> list[Limit]:
    """The limits that would take `talk` out of what is claimed, the most particular first."""
    long = [*(_long(role, count) for role in ROLES for count in counts[::-1] if count >= _LONG_TEXT)]
    long += [_many(count) for count in counts[::-1] if count > _SEVERAL]
    marks = _telling(literals, talk)
    limits = [
        limit
        for role in ROLES
        for limit in (_empty(role), _edges(role), *(_contains(role, mark) for mark in marks))
    ]
    limits += [
        Limit("a conversation that the assistant begins", _assistant_begins),
        Limit("a system message after the first message", _system_later),
    ]
    return [limit for limit in (*limits, *long) if limit.holds(talk)]


def _texts(talk: Conversation, role: str) -> list[str]:
    return [str(message["content"]) for message in talk if message["role"] == role]


def _empty(role: str) -> Limit:
    return Limit(f"an empty {role} message", lambda talk: "" in _texts(talk, role))


def _edges(role: str) -> Limit:
    return Limit(
        f"{role} text with leading or trailing whitespace",
        lambda talk: any(text != text.strip() for text in _texts(talk, role)),
    )


def _contains(role: str, text: str) -> Limit:
    return Limit(
        f"{role} text that contains {json.dumps(text, ensure_ascii=False)}",
        lambda talk: any(text in content for content in _texts(talk, role)),
    )


def _long(role: str, length: int) -> Limit:
    return Limit(
        f"{role} text of {length:,} characters or more",
        lambda talk: any(len(text) >= length for text in _texts(talk, role)),
    )


def _many(messages: int) -> Limit:
    return Limit(f"{messages:,} messages or more", lambda talk: len(talk) >= messages)


def _telling(literals: Sequence[str], talk: Conversation) -> list[str]:
    """Literals in `talk` that people do not write by chance, the longest first."""
    shown = "\n".join(str(message["content"]) for message in talk)
    marks = {literal.strip() for literal in literals if _TELLING.search(literal.strip())}
    return sorted((mark for mark in marks if mark in shown), key=lambda mark: (-len(mark), mark))


def _assistant_begins(talk: Conversation) -> bool:
    spoken = [message["role"] for message in talk if message["role"] != "system"]
    return spoken[:1] == ["assistant"]


def is_ordinary(talk: Conversation) -> bool:
    """Whether it is a conversation as people have them: the user begins, a system message only in front."""
    known = all(message["role"] in ROLES for message in talk)
    return known and not _assistant_begins(talk) and not _system_later(talk) and _takes_turns(talk)


def _system_later(talk: Conversation) -> bool:
    return any(message["role"] == "system" for message in talk[1:])


def shrink(talk: Conversation, fails: Callable[[Conversation], bool]) -> Conversation:
    """The smallest conversation near `talk` for which `fails` still holds."""
    while True:
        smaller = next((part for part in _smaller(talk) if _takes_turns(part) and fails(part)), None)
        if smaller is None:
            return talk
        talk = smaller


def _takes_turns(talk: Conversation) -> bool:
    """Whether something is claimed of it: the user last, no two neighbours of one role."""
    roles = [message["role"] for message in talk]
    return roles[-1:] == ["user"] and all(role != other for role, other in pairwise(roles))


def _smaller(talk: Conversation) -> Iterator[Conversation]:
    system, spoken = talk[: talk[0]["role"] == "system"], talk[talk[0]["role"] == "system" :]
    if system:
        yield spoken
    for start in range(len(spoken) - 1):
        yield (*system, *spoken[:start], *spoken[start + 2 :])
    for place, message in enumerate(talk):
        for text in _shorter(str(message["content"])):
            yield (*talk[:place], _message(message["role"], text), *talk[place + 1 :])


def _shorter(text: str) -> Iterator[str]:
    if text == "x":
        return
    yield "x"
    half = len(text) // 2
    if len(text) > 3:
        yield from (text[:half], text[half:])
    if 1 < len(text) < 80:
        yield from (text[:place] + text[place + 1 :] for place in range(len(text)))
