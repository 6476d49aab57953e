"""The template is rendered as transformers renders it, and its pins hold everywhere."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from forge.chat.template import CHATML, DEFAULT_DAY, ChatTemplate, Message
from forge.errors import DataError
from tests.models import template_files

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
USER: Message = {"role": "user", "content": "There is bacon in this sandwich."}
ANSWER: Message = {"role": "assistant", "content": "In this sandwich, bacon there is."}
SYSTEM: Message = {"role": "system", "content": "Speak like Yoda."}
NASTY: Message = {"role": "user", "content": '  <b>&"\'</b> {{ x }} {% if %}\n\tünï 🙂\n '}
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
@pytest.mark.parametrize("path", template_files(), ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_every_public_template_renders_as_in_transformers(path: Path, transformers_day: None) -> None:
    """M1, D1. And pinned: the same text from transformers, whatever else it is given."""
    source = path.read_text(encoding="utf-8")
    template = ChatTemplate(source, TOKENS)
    others: dict[str, Any] = {name: "other" for name in template.variables_read()}
    pinned = template.pinned_source()
    for messages in CONVERSATIONS:
        for prompted in (False, True):
            expected = reference(source, messages, prompted, {})
            assert ours(template, messages, prompted) == expected
            assert reference(pinned, messages, prompted, others) == expected


def test_the_templates_are_all_there() -> None:
    assert len(template_files()) > 130
