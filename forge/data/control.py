"""Control tokens that a row holds as words: `<|im_end|>` in a question about chat templates, say.

llama.cpp and Ollama read a rendered prompt with its control tokens, whoever wrote them. So a prompt is
learned with them, as it is served; one with a token of the template's own, which would part turns where there
are none, is refused. In the answer they are words: a control token that the model generates is not shown.
What ends a reply is refused there, since servers stop at its text as well.

Not covered: added tokens that are no control tokens (`<think>`), which are one token everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from forge.data.conversation import Conversation, Turn
from forge.data.fields import ALPACA_MARKS, TEMPLATE_MARKS
from forge.data.prompt_format import PromptFormat
from forge.errors import DataError

_BEGINNING = 60  # characters: a mark may stand behind a BOS and a blank
# How texts begin that were a prompt and its answer: Alpaca's, Vicuna's.
_OF_TEXTS = (*ALPACA_MARKS, "USER: ", "### User:")
IN_ANSWER = "hold control tokens as words in an answer: encoded as plain text"
IN_PROMPT = "hold control tokens in their prompt: encoded as such, which is how servers read them"
IN_TEXT = "hold control tokens as words: encoded as plain text"
RENDERED = (
    "are written in a chat template already and learned whole, questions too: give them as messages to learn "
    "their answers only"
)
FOREIGN = (
    "are written in another chat template, whose marks are plain text to this base: give them as messages "
    "for its own"
)


def check_answer(turn: Turn, form: PromptFormat) -> None:
    """Refuse an answer that holds what ends a reply: servers stop at its text."""
    for text in _texts(turn):
        for end in form.ends:
            if end in text:
                raise DataError(
                    f"the answer contains {end}, which ends a turn",
                    hint="take it out of these rows: the template writes what ends an answer",
                )


def in_prompt(conversation: Conversation, last: int, form: PromptFormat) -> bool:
    """Whether what stands before the answer at `last` holds control tokens; refuses the template's own."""
    is_held = False
    for what, text in _of_prompt(conversation, last):
        tokens = form.controls_in(text)
        is_held = is_held or bool(tokens)
        own = next((token for token in tokens if token in form.structure), None)
        if own is None:
            continue
        if text.lstrip().startswith(own):
            raise DataError(
                f"{what} begins with {own}: it is written in a chat template already",
                hint="give the words of each turn as messages; the template is the base's",
            )
        raise DataError(
            f"{what} holds {own}, which the chat template uses: servers would read it as that token",
            hint="take it out of these rows, or write it with a space in it",
        )
    return is_held


def in_answer(turn: Turn, form: PromptFormat) -> bool:
    return any(form.controls_in(text) for text in _texts(turn))


def answer_ids(answer: str, turn: Turn, form: PromptFormat) -> list[int]:
    """The ids of `answer`, up to its end of turn, with the control tokens that are its own as words."""
    if not in_answer(turn, form):
        return form.ids(answer)
    body = answer.removesuffix(form.end_of_turn)
    ids = form.plain_ids(body)
    own = sum(len(form.controls_in(text)) for text in _texts(turn))
    if len(form.controls_in(body)) != own or not form.control.keys().isdisjoint(ids):
        raise DataError(
            f"the answer holds {form.controls_in(body)[0]} as words, which this tokenizer or template cannot "
            "keep apart from its control tokens",
            hint="take it out of these rows, or write it with a space in it",
        )
    return [*ids, form.end_of_turn_id]


def text_ids(text: str, form: PromptFormat) -> tuple[list[int], tuple[str, ...]]:
    """The ids of a text that is learned whole, with the tokenizer's own BOS, and what is to be said of it."""
    ids: list[int] = form.tokenizer.encode(text).ids
    body = text.rstrip()
    for end in form.ends:
        body = body.removesuffix(end)  # what ends the whole text may stand in it
    if not form.controls_in(body):
        is_foreign = any(mark in text[:_BEGINNING] for mark in (*TEMPLATE_MARKS, *_OF_TEXTS))
        return ids, (FOREIGN,) if is_foreign else ()
    if is_rendered(body, form):
        return ids[ids[:2] == [form.bos_id] * 2 :], (RENDERED,)
    return form.plain_ids(body, add_special_tokens=True), (IN_TEXT,)


def is_rendered(text: str, form: PromptFormat) -> bool:
    """Whether a text begins with a token of the template's and holds its end of turn."""
    return form.end_of_turn in text and text.lstrip().startswith(tuple(form.structure))


def _texts(turn: Turn) -> Iterator[str]:
    yield turn.content
    if turn.reasoning:
        yield turn.reasoning
    for call in turn.tool_calls:
        yield json.dumps([call.name, call.arguments], ensure_ascii=False)


def _of_prompt(conversation: Conversation, last: int) -> Iterator[tuple[str, str]]:
    for number, turn in enumerate(conversation.turns[:last]):
        yield from ((f"message {number} ({turn.role})", text) for text in _texts(turn))
    for tool in conversation.tools:
        yield "tools", json.dumps(tool, ensure_ascii=False)
