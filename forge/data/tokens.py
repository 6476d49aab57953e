"""Conversations to token ids and loss mask, before and apart from any training library.

A row is rendered whole and encoded once; each assistant turn is supervised from the first token
after its prompt to its end-of-turn token, both found by rendering the conversation up to there.
What must hold for that is checked, not assumed: the prompt is a prefix of the row, in text and in
ids (pitfall 50); the end of turn is in the loss (pitfall 27, 28); the mask is not empty (pitfall 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forge.chat.template import ChatTemplate
from forge.data.conversation import Conversation, Turn
from forge.data.problems import BadRows
from forge.errors import DataError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORED = -100  # the label that torch's cross-entropy leaves out
_SENTINEL = "Lorem ipsum"


@dataclass(frozen=True)
class Encoded:
    """One row: ids, and labels of the same length with `IGNORED` where there is no loss."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    conversation: Conversation

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class PromptFormat:
    """What encoding needs: the template, the tokenizer, and the token that ends a turn."""

    template: ChatTemplate
    tokenizer: Tokenizer
    end_of_turn: str
    end_of_turn_id: int

    @property
    def bos_id(self) -> int | None:
        bos = self.template.special_tokens.get("bos_token")
        number: int | None = self.tokenizer.token_to_id(bos) if bos else None
        return number

    def ids(self, text: str) -> list[int]:
        """Ids of `text` as it is: the template has written every special token (pitfall 48)."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def prompt_format(template: ChatTemplate, tokenizer: Tokenizer) -> PromptFormat:
    """Find the end-of-turn token by rendering a sentinel answer.

    Raises `DataError` when the template closes an answer with no special token: a model trained
    so would never stop (pitfall 28).
    """
    question = {"role": "user", "content": "dolor sit amet"}
    text = template.render([question, {"role": "assistant", "content": _SENTINEL}])
    _, found, after = text.partition(_SENTINEL)
    if not found:
        raise DataError(
            "the chat template does not show the assistant's answer",
            hint="look at chat_template.jinja in the base's directory",
        )
    special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    at_start = after.lstrip()
    matching = [token for token in special if at_start.startswith(token)]
    if not matching:
        raise DataError(
            f"the chat template ends an answer with {after[:40]!r}, which is not a special token: "
            "a model trained on it would not learn to stop",
            hint="use the template of the base's instruct version, or end the turn with the EOS token",
        )
    end = max(matching, key=len)
    return PromptFormat(template, tokenizer, end, special[end])


def encode_all(
    conversations: Sequence[Conversation],
    form: PromptFormat,
    *,
    supervise: str = "all",
    bad: BadRows | None = None,
) -> list[Encoded]:
    """Encode every row, or raise one `DataError` that names every row which cannot be.

    `bad` says how many may be left out instead.
    """
    problems: list[Problem] = []
    encoded: list[Encoded] = []
    for conversation in conversations:
        try:
            encoded.append(_encode(conversation, form, supervise))
        except DataError as error:
            problems.append(conversation.place.problem(error.message))
    (bad or BadRows()).settle(
        problems,
        f"{len(problems)} of {len(conversations)} rows cannot be encoded with this base's template",
        "train.supervise: last trains on the last answer alone"
        if any("prefix" in problem.message for problem in problems)
        else "mend these rows, or leave them out",
    )
    return encoded


def _encode(conversation: Conversation, form: PromptFormat, supervise: str) -> Encoded:
    turns = conversation.turns
    if not turns:
        return _text(conversation, form)
    if conversation.tools or any(turn.tool_calls or turn.role == "tool" for turn in turns):
        raise DataError("has tools, which cannot be trained yet")
    whole = form.template.render(conversation.messages())
    _check_content(turns, whole, form)
    ids = form.ids(whole)
    if form.bos_id is not None and ids[:2] == [form.bos_id] * 2:
        raise DataError("the row begins with BOS twice: the template writes one that is there already")
    labels = [IGNORED] * len(ids)
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    asked = [
        index
        for index in (answers if supervise == "all" else answers[-1:])
        if turns[index].trained is not False
    ]
    if not asked:
        raise DataError("no answer of the row carries loss: its own weight or train leaves them out")
    for index in asked:
        start, end = _answer_span(turns, index, whole, ids, form)
        labels[start:end] = ids[start:end]
    # What follows the last end of turn (a newline, say) is never generated: the server has stopped.
    last = max(position for position, label in enumerate(labels) if label != IGNORED) + 1
    return Encoded(tuple(ids[:last]), tuple(labels[:last]), conversation)


def _text(conversation: Conversation, form: PromptFormat) -> Encoded:
    """A plain text: the tokenizer's own BOS, the text, EOS; all of it carries loss."""
    ids: list[int] = form.tokenizer.encode(conversation.text).ids
    eos = form.tokenizer.token_to_id(form.template.special_tokens.get("eos_token", ""))
    end = form.end_of_turn_id if eos is None else eos
    ids += [end] if ids[-1:] != [end] else []
    if len(ids) < 2:
        raise DataError("the text has no token to predict")
    return Encoded(tuple(ids), tuple(ids), conversation)


def _answer_span(
    turns: Sequence[Turn], index: int, whole: str, ids: list[int], form: PromptFormat
) -> tuple[int, int]:
    """Token positions [start, end) of the answer at `index`, its end of turn included."""
    prompt = form.template.render([turn.as_message() for turn in turns[:index]], add_generation_prompt=True)
    if not whole.startswith(prompt):
        raise DataError("the prompt is not a prefix of the conversation: the template rewrites earlier turns")
    start = _prefix_length(prompt, ids, form)
    content_at = whole.find(turns[index].content.strip(), len(prompt))
    closing_at = whole.find(form.end_of_turn, content_at + len(turns[index].content.strip()))
    if content_at < 0 or closing_at < 0:
        raise DataError(f"the answer does not end with {form.end_of_turn}")
    end = _prefix_length(whole[: closing_at + len(form.end_of_turn)], ids, form)
    if end <= start + 1:
        raise DataError("the answer has no token of its own")
    if ids[end - 1] != form.end_of_turn_id:
        raise DataError(f"the end of turn {form.end_of_turn} is not one token at the end of the answer")
    return start, end


def _prefix_length(prefix: str, ids: list[int], form: PromptFormat) -> int:
    alone = form.ids(prefix)
    if ids[: len(alone)] != alone:
        raise DataError(
            "the prompt's token ids are not a prefix of the row's: "
            "its last characters merge with the answer's first"
        )
    return len(alone)


def _check_content(turns: Sequence[Turn], whole: str, form: PromptFormat) -> None:
    for number, turn in enumerate(turns):
        if turn.content.strip() not in whole:
            raise DataError(f"message {number} ({turn.role}) is dropped or changed by the template")
        if turn.role == "assistant" and form.end_of_turn in turn.content:
            raise DataError(f"the answer contains {form.end_of_turn}, which ends a turn")
