"""The template is rendered as transformers renders it, and its pins hold everywhere."""

# ruff: noqa: E501 - one template a line
from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import pytest

from forge.chat.template import DEFAULT_DAY, ChatTemplate, Message
from forge.errors import DataError, ForgeError
from tests.vocabularies import template_files

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
USER: Message = {"role": "user", "content": "There is bacon in this sandwich."}
ANSWER: Message = {"role": "assistant", "content": "In this sandwich, bacon there is."}
SYSTEM: Message = {"role": "system", "content": "Speak like Yoda."}
NASTY: Message = {"role": "user", "content": "  <b>&\"'</b> {{ x }} {% if %}\n\tünï 🙂\n "}
CONVERSATIONS: Sequence[Sequence[Message]] = (
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER, NASTY],
    [NASTY, ANSWER, USER, ANSWER],
    [ANSWER, ANSWER],
)


@pytest.fixture(scope="module")
def transformers_day() -> Iterator[None]:
    """Transformers' clock stands at the day that forge pins."""
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls.fromisoformat(DEFAULT_DAY)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Clock)
        yield


def reference(
    source: str, messages: Sequence[Message], prompted: bool, given: Mapping[str, Any]
) -> str | None:
    """What transformers renders; None when the template refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=source,
            add_generation_prompt=prompted,
            **{**TOKENS, **given},
        )
    except Exception as error:  # noqa: BLE001 - whatever a foreign template raises
        assert not isinstance(error, AssertionError)
        return None
    return str(rendered[0])


def ours(template: ChatTemplate, messages: Sequence[Message], prompted: bool) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=prompted)
    except DataError:
        return None


@pytest.mark.training
def test_every_public_template_renders_as_in_transformers(transformers_day: None) -> None:
    """M1, D1. And pinned: the same text from transformers, whatever else it is given (silent wrong 17)."""
    files = template_files()
    assert len(files) > 130
    differing: list[str] = []
    rendered = 0
    for path in files:
        source = path.read_text(encoding="utf-8")
        template = ChatTemplate(source, TOKENS)
        others: dict[str, Any] = dict.fromkeys(template.variables_read(), "other")
        pinned = template.pinned_source()
        for number, (messages, prompted) in enumerate(product(CONVERSATIONS, (False, True))):
            expected = reference(source, messages, prompted, {})
            rendered += expected is not None
            if ours(template, messages, prompted) != expected:
                differing.append(f"{path.name} {number}")
            if reference(pinned, messages, prompted, others) != expected:
                differing.append(f"{path.name} {number} pinned")
    assert differing == []
    assert rendered > 6 * len(files)


def test_the_day_is_pinned() -> None:
    """A prompt that changes overnight can be neither trained nor proved."""
    source = (
        "{{ strftime_now('%d %b %Y') }}|{% if x is defined %}{{ x }}{% endif %}|{{ messages[0].content }}"
    )
    assert ChatTemplate(source).render([USER]) == f"26 Jul 2024||{USER['content']}"
    told = ChatTemplate(source, {}, {"today": "2026-01-31", "x": 'a "b"\n'})
    assert told.render([USER]) == f'31 Jan 2026|a "b"\n|{USER["content"]}'
    again = ChatTemplate(told.pinned_source(), {}, {"today": "1999-09-09", "x": "other"})
    assert again.render([USER]) == told.render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "\n  leading text {{ flag }}",
        "  {% if flag %}yes{% else %}no{% endif %}",
        "\n\n{#- a comment -#}\n {{ flag }}",
        "{%- if flag is defined %}{{ flag }}{% else %}unset{% endif %}",
        "{% macro shown() %}{{ flag }}{% endmacro %}{{ shown() }}",
        "{% for m in messages %}{% if not flag is defined %}{% set flag = 1 %}{% endif %}"
        "{{ flag }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("value", [True, False, None, 3, 0.5, "text", "ünï {{ x }} 'q' \"Q\" \\ \n"])
def test_pins_change_nothing_else(source: str, value: object) -> None:
    """Where the template begins with spaces or a block, and for each kind of value."""
    template = ChatTemplate(source, {}, {"flag": value})
    assert ChatTemplate(template.pinned_source()).render([USER]) == template.render([USER])
    without = ChatTemplate(source)
    served = ChatTemplate(without.pinned_source(), {}, {"flag": "the server's"})
    assert served.render([USER]) == without.render([USER])


def test_variables_read() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ mood }}{% endfor %}{{ thinking or tools }}"
    )
    assert ChatTemplate(source).variables_read() == ("mood", "thinking")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ('\\n' * 999999) | indent(999999, blank=true) }}",
        "{{ ('\\t' * 999999).expandtabs(999999) }}",
        "{{ ('x' * 999999).translate({120: 'y' * 999999}) }}",
        "{{ ('x' * 999999) | wordwrap(1, wrapstring='y' * 999999) }}",
        "{{ (range(99999) | list) | replace(',', 'x' * 999999) }}",
        "{{ ('%(a)99999d' * 50000) % {'a': 1} }}",
        "{{ 'x'.encode() * 100000000000 }}",
        "{{ 'x'.encode().center(100000000000) }}",
        "{{ (1).to_bytes(100000000000, 'big') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ dict.__class__.__base__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ lipsum.__globals__.os.getcwd() }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% include 'other' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(ForgeError, match=r"the chat template('s prompt took| refuses| takes| writes)"):
        ChatTemplate(source).render([USER])


def test_what_a_template_says_is_told() -> None:
    refusing = ChatTemplate("{{ raise_exception('no system role, please') }}")
    with pytest.raises(DataError, match="no system role, please"):
        refusing.render([SYSTEM, USER])
    with pytest.raises(DataError, match=r"not valid Jinja: line 2"):
        ChatTemplate("a\n{% if %}")
    with pytest.raises(DataError, match="'tomorrow' is not a date"):
        ChatTemplate("a", {}, {"today": "tomorrow"})
    with pytest.raises(DataError, match="computed format"):
        ChatTemplate("{{ strftime_now(f) }}").pinned_source()


def test_messages_are_not_changed() -> None:
    messages = [dict(USER)]
    with pytest.raises(DataError, match="refuses"):
        ChatTemplate("{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}").render(messages)
    assert messages == [dict(USER)]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10000000000 }}",
        "{{ [1] * 999999999 }}",
        "{{ 9 ** 99 ** 99 }}",
        "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x | replace('x', 'xx') %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x.replace('', n.x) %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        "{% set n = namespace(x='xy') %}{% for i in range(99) %}{% set n.x = n.x.join(n.x) %}{% endfor %}",
        "{% set n = namespace(x='xy') %}{% for i in range(99) %}{% set n.x = n.x | map('string') | join(n.x) %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}{% endfor %}",
        "{% set x = 'x' * 999999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x'.rjust(1000000000) }}",
        "{{ 'x'.zfill(1000000000) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x\\n\\ny' | indent(1000000000) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(999999999) | list }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_malicious_templates_are_refused(source: str) -> None:
    """Style row 23: no way out of the sandbox, no text that fills the memory, no endless step."""
    with pytest.raises(
        ForgeError, match=r"the chat template('s prompt took| refuses| takes| writes)"
    ) as caught:
        ChatTemplate(source).render([USER])
    assert caught.value.code == 2


def test_ordinary_arithmetic_is_let_through() -> None:
    assert (
        ChatTemplate("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ [0] * 2 }}").render([USER]) == "---102412[0, 0]"
    )
    wanted = "{{ 'a' + 'b' ~ 1 ~ 'x'.center(3) }}{{ '%s-%02d' % ('a', 7) }}{{ '{:>4}'.format(1) }}"
    wanted += (
        "{{ ['a', 'b'] | map('upper') | join(', ') }}{{ 'aba'.replace('a', 'c') }}{{ {'a': 1} | tojson }}"
    )
    assert ChatTemplate(wanted).render([USER]) == 'ab1 x a-07   1A, Bcbc{"a": 1}'
    assert (
        len(ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": "x" * 5_000_000}]))
        == 5_000_000
    )
