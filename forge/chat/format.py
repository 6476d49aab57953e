"""What a chat template does, inferred by rendering conversations of unmistakable texts and cutting there.

A conversation's prompt is: lead, then for each message prefix + content + suffix, then the generation
prompt. The suffix of a role is what follows its text everywhere; the rest of the text between two
messages is the next one's prefix and may depend on three things only: whether the message is the
first of its role, the last of its role, and whether the conversation has a system message.

Covered: text chat with an optional system message at the start, then user and assistant in turn,
the user's message last. An inference is a guess until `format_check` has compared it.
Not covered: tools, images, thinking as a field of its own, two neighbours of one role.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Literal

from forge.chat.template import ChatTemplate, Message
from forge.errors import DataError

# Stands in a format's texts where the system message's text goes.
HELD = "\x00"
FEATURES = ("first", "last", "system")
# As many turns as it takes to tell first, middle and last apart, and one more.
_TURNS = 4
_SENTINEL = {"system": "qzSystemTextzq", "user": "qzUserText{}zq", "assistant": "qzAnswerText{}zq"}
_SPECIAL = re.compile(r"<[^<>\s]+>|\[/?[A-Za-z_]+\]|〈\|[^〈〉]+\|〉")

SystemPolicy = Literal["turn", "held", "dropped", "refused"]


class NotInferredError(DataError):
    """The template does something that a ChatFormat cannot say; the message says what."""


@dataclass(frozen=True)
class FeatureChoice:
    """A text that may depend on features: a leaf has `text`, a node asks `feature`."""

    text: str = ""
    feature: str = ""
    yes: FeatureChoice | None = None
    no: FeatureChoice | None = None

    @property
    def size(self) -> int:
        return 1 + (self.yes.size if self.yes else 0) + (self.no.size if self.no else 0)

    def features(self) -> set[str]:
        below = [part.features() for part in (self.yes, self.no) if part]
        return {self.feature, *set().union(*below)} - {""}

    def texts(self) -> list[str]:
        return [text for part in (self.yes, self.no) if part for text in part.texts()] or [self.text]


@dataclass(frozen=True)
class ChatFormat:
    """What a template does with a conversation.

    `system` says where a system message goes: `turn` (before the first user message, in a turn of
    its own or folded into the user's), `held` (into other texts, where they have `HELD`), `dropped`
    or `refused` (with the template's words in `refusal`). `stops` end a reply.
    """

    lead: str
    prefix: Mapping[str, FeatureChoice]
    suffix: Mapping[str, str]
    generation: FeatureChoice
    system: SystemPolicy
    refusal: str = ""
    default_system: str | None = None
    stops: tuple[str, ...] = ()
    variables: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class _Gap:
    """The text between two messages; `before` and `after` are roles, "" at an end of the prompt."""

    before: str
    after: str
    text: str
    features: frozenset[str]


def infer(template: ChatTemplate) -> ChatFormat:
    """The template's format; raises `NotInferredError` with a reason that a user understands."""
    try:
        template.render(_conversation(False, 1), add_generation_prompt=True)
    except DataError as error:
        raise NotInferredError(f"it refuses even a single user message ({error.message})") from error
    policy, refusal = _system_policy(template)
    gaps = _gaps(template, policy)
    bos = template.special_tokens.get("bos_token", "")
    lead = bos if all(gap.text.startswith(bos) for gap in gaps if not gap.before) else ""
    suffix = {role: _suffix(template, gaps, role) for role in ("user", "assistant")} | {"": lead}
    suffix["system"] = _system_suffix(gaps, len(suffix["assistant"]))
    prefix = {role: _choice(gaps, role, suffix) for role in ("system", "user", "assistant")}
    generation = _choice(gaps, "", suffix)
    return ChatFormat(
        lead=lead,
        prefix=prefix,
        suffix={role: text for role, text in suffix.items() if role},
        generation=generation,
        system=policy,
        refusal=refusal,
        default_system=_default_system(gaps) if policy == "turn" else None,
        stops=_stops(template, suffix["assistant"], prefix["user"]),
        variables=template.variables_read(),
    )


def _conversation(has_system: bool, turns: int) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": _SENTINEL["system"]}] if has_system else []
    for number in range(turns):
        messages.append({"role": "user", "content": _SENTINEL["user"].format(number)})
        messages.append({"role": "assistant", "content": _SENTINEL["assistant"].format(number)})
    return messages[:-1]


def _system_policy(template: ChatTemplate) -> tuple[SystemPolicy, str]:
    marks = set()
    for turns in range(1, _TURNS + 1):
        try:
            text = template.render(_conversation(True, turns), add_generation_prompt=True)
        except DataError as error:
            return "refused", error.message.partition(": ")[2]
        before, shown, after = text.partition(_SENTINEL["system"])
        if not shown:
            marks.add("dropped")
        elif _SENTINEL["system"] in after or _SENTINEL["user"].format(0) in before:
            marks.add("held")
        else:
            marks.add("turn")
    # A system text that is folded into the last user's comes first where there is one turn only.
    policies: tuple[SystemPolicy, ...] = ("held", "turn", "dropped")
    return next(policy for policy in policies if policy in marks), ""


def _gaps(template: ChatTemplate, policy: SystemPolicy) -> list[_Gap]:
    gaps = []
    for has_system in (False, True):
        if has_system and policy == "refused":
            continue
        for turns in range(1, _TURNS + 1):
            messages = _conversation(has_system, turns)
            text = template.render(messages, add_generation_prompt=True)
            if policy != "turn":
                text = text.replace(_SENTINEL["system"], HELD)
                messages = [message for message in messages if message["role"] != "system"]
            gaps += _cut(text, messages, has_system, turns)
    return gaps


def _cut(text: str, messages: Sequence[Message], has_system: bool, turns: int) -> list[_Gap]:
    gaps: list[_Gap] = []
    before, seen = "", {"user": 0, "assistant": 0, "system": 0}
    for message in messages:
        role, content = message["role"], message["content"]
        if text.count(content) != 1:
            raise NotInferredError(_unseen(role, text, content, gaps))
        gap, _, text = text.partition(content)
        seen[role] += 1
        number = {"user": turns, "assistant": turns - 1, "system": 1}[role]
        gaps.append(_Gap(before, role, gap, _features(seen[role] == 1, seen[role] == number, has_system)))
        before = role
    return [*gaps, _Gap(before, "", text, _features(turns == 1, False, has_system))]


def _features(first: bool, last: bool, system: bool) -> frozenset[str]:
    return frozenset(name for name, on in zip(FEATURES, (first, last, system), strict=True) if on)


def _unseen(role: str, text: str, content: str, gaps: Sequence[_Gap]) -> str:
    if content in text:
        return f"it shows the text of one {role} message more than once"
    if gaps:
        return f"it leaves out the text of {role} messages, or puts messages in another order"
    return (
        f"it does not show the text of {role} messages (it reads lists of parts, as templates for images do)"
    )


def _suffix(template: ChatTemplate, gaps: Sequence[_Gap], role: str) -> str:
    """What follows every text of `role`; the end of a conversation without prompt tells it apart."""
    texts = [gap.text for gap in gaps if gap.before == role]
    ending = _conversation(False, 2)[: 3 if role == "user" else 2]
    try:
        rendered = template.render(ending)
    except DataError:
        rendered = ""
    last = str(ending[-1]["content"])
    if rendered.count(last) == 1 and (end := rendered.partition(last)[2]):
        texts.append(end)
    return _common_start(texts)


def _system_suffix(gaps: Sequence[_Gap], answer_suffix: int) -> str:
    """What follows a system text; only the user comes after it, whose usual prefix later turns show."""
    texts = [gap.text for gap in gaps if gap.before == "system"]
    usual = next(gap.text for gap in gaps if (gap.before, gap.after) == ("assistant", "user"))[answer_suffix:]
    if usual and all(text.endswith(usual) for text in texts):
        texts = [text.removesuffix(usual) for text in texts]
    return _common_start(texts)


def _common_start(texts: Sequence[str]) -> str:
    return os.path.commonprefix(texts)  # noqa: RUF071 - by characters is what is wanted


def _choice(gaps: Sequence[_Gap], role: str, suffix: Mapping[str, str]) -> FeatureChoice:
    """The smallest decision over the features that gives every observed prefix of `role`."""
    observed: dict[frozenset[str], str] = {}
    for gap in gaps:
        if gap.after != role or (not role and not gap.before):
            continue
        text = gap.text[len(suffix[gap.before]) :]
        if observed.setdefault(gap.features, text) != text:
            raise NotInferredError(
                f"the text before {role + ' messages' if role else 'the reply'} depends on more than position"
            )
    trees = [_decision(observed, order) for order in permutations(FEATURES)]
    return min(trees, key=lambda tree: tree.size)


def _decision(observed: Mapping[frozenset[str], str], order: Sequence[str]) -> FeatureChoice:
    texts = list(observed.values())
    if len(set(texts)) <= 1:
        return FeatureChoice(texts[0] if texts else "")
    feature, *others = order
    yes = {key: text for key, text in observed.items() if feature in key}
    no = {key: text for key, text in observed.items() if feature not in key}
    if not (yes and no):
        return _decision(observed, others)
    tree = FeatureChoice("", feature, _decision(yes, others), _decision(no, others))
    return tree.yes if tree.yes and tree.yes == tree.no else tree


def _default_system(gaps: Sequence[_Gap]) -> str | None:
    """The system text that the template writes when it is given none."""
    without = next(gap.text for gap in gaps if not gap.before and gap.after == "user")
    opening = next(gap.text for gap in gaps if gap.after == "system")
    closing = next(gap.text for gap in gaps if gap.before == "system")
    fits = len(without) > len(opening + closing)
    if fits and without.startswith(opening) and without.endswith(closing):
        return without[len(opening) : len(without) - len(closing)]
    return None


def _stops(template: ChatTemplate, end: str, user: FeatureChoice) -> tuple[str, ...]:
    """The token that closes the assistant's turn (else the one that opens the user's), and EOS."""
    eos = template.special_tokens.get("eos_token", "")
    following = end + next((text for text in user.texts()[::-1] if text), "")
    known = [token for token in template.special_tokens.values() if token and token in following]
    special = _SPECIAL.search(following)
    places = [(following.index(token), token) for token in known]
    places += [(special.start(), special.group())] if special else []
    first = min(places)[1] if places else "".join(following.strip().splitlines()[:1])
    return tuple(dict.fromkeys(stop for stop in (first, eos) if stop))
