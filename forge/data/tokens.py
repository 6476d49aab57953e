"""Conversations to token ids and loss mask, before and apart from any training library.

Each answer is learned after the prompt that a server gives the model for it. Where the row's text holds
every answer so, the row is encoded once; where the template writes earlier turns otherwise once the
conversation goes on (it leaves out their thinking, say), each answer becomes a row of its own.
What must hold for that is checked, not assumed: the prompt is a prefix of the row, in text and in
ids (pitfall 50); the end of turn is in the loss (pitfall 27, 28); the mask is not empty (pitfall 16);
what the row holds is in the text (`shown`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forge.chat.template import ChatTemplate
from forge.data import shown
from forge.data.conversation import Conversation, Json, Turn
from forge.data.problems import BadRows
from forge.errors import DataError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORED = -100  # the label that torch's cross-entropy leaves out
_SENTINEL = "Lorem ipsum"
_ONE_EACH = (
    "made of the answers of rows with several: the template writes earlier turns otherwise than the last, "
    "and a server prompts each answer so"
)
_CUT_THINKING = "the template leaves out the thinking of earlier answers, as it does when the model is served"


@dataclass(frozen=True)
class Encoded:
    """One row: ids, and labels of the same length with `IGNORED` where there is no loss."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    conversation: Conversation
    notes: tuple[str, ...] = ()
    """What encoding made of the row, for the account of all rows."""

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

    A row is several where the template rewrites earlier turns (`Encoded.notes` of each tells).
    `bad` says how many may be left out instead.
    """
    problems: list[Problem] = []
    encoded: list[Encoded] = []
    hints: list[str] = []
    for conversation in conversations:
        try:
            encoded += _encode(conversation, form, supervise)
        except DataError as error:
            problems.append(conversation.place.problem(error.message))
            hints += [error.hint] if error.hint else []
    (bad or BadRows()).settle(
        problems,
        f"{len(problems)} of {len(conversations)} rows cannot be encoded with this base's template",
        "; ".join(dict.fromkeys(hints)) or "mend these rows, or leave them out",
    )
    return encoded


@dataclass(frozen=True)
class _Answer:
    """One answer as it is learned: the `prompt` a server gives, and the answer up to its end of turn."""

    index: int
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def _encode(conversation: Conversation, form: PromptFormat, supervise: str) -> list[Encoded]:
    turns = conversation.turns
    if not turns:
        return [_text(conversation, form)]
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    for index in answers:
        shown.check_ends(turns[index], form.end_of_turn)
    asked = [
        index
        for index in (answers if supervise == "all" else answers[-1:])
        if turns[index].trained is not False
    ]
    if not asked:
        raise DataError("no answer of the row carries loss: its own weight or train leaves them out")
    whole = form.template.render(_messages(turns, form.template), tools=conversation.tools)
    # An answer that only calls tools could be left out without a trace, so each is looked at.
    looked_at = sorted({*asked, *(index for index in answers if turns[index].tool_calls)})
    learned = [_answer(conversation, index, whole, form) for index in looked_at]
    shown.check_prompt(conversation, whole, form.template)
    learned = [one for one in learned if one.index in asked]
    if len(learned) == 1 or all(whole.startswith(one.text) for one in learned):
        return [_row(conversation, learned, form)]
    return [_row(_up_to(conversation, one.index), [one], form, _ONE_EACH) for one in learned]


def _up_to(conversation: Conversation, index: int) -> Conversation:
    """The conversation that ends with the answer at `index`, which alone carries loss."""
    before = (
        replace(turn, trained=False) if turn.role == "assistant" else turn
        for turn in conversation.turns[:index]
    )
    return replace(conversation, turns=(*before, conversation.turns[index]))


def _row(conversation: Conversation, learned: Sequence[_Answer], form: PromptFormat, *notes: str) -> Encoded:
    """The text up to the end of the last answer that is learned.

    What follows an end of turn (a newline, say) is never generated: the server has stopped.
    """
    ids = form.ids(learned[-1].text)
    if form.bos_id is not None and ids[:2] == [form.bos_id] * 2:
        raise DataError("the row begins with BOS twice: the template writes one that is there already")
    labels = [IGNORED] * len(ids)
    for one in learned:
        start, end = _prefix_length(one.prompt, ids, form), _prefix_length(one.text, ids, form)
        if end <= start + 1:
            raise DataError("the answer has no token of its own")
        if ids[end - 1] != form.end_of_turn_id:
            raise DataError(f"the end of turn {form.end_of_turn} is not one token at the end of the answer")
        labels[start:end] = ids[start:end]
    if not shown.earlier_thinking(conversation.turns[: learned[-1].index], learned[-1].prompt):
        notes = (*notes, _CUT_THINKING)
    return Encoded(tuple(ids), tuple(labels), conversation, notes)


def _text(conversation: Conversation, form: PromptFormat) -> Encoded:
    """A plain text: the tokenizer's own BOS, the text, EOS; all of it carries loss."""
    ids: list[int] = form.tokenizer.encode(conversation.text).ids
    eos = form.tokenizer.token_to_id(form.template.special_tokens.get("eos_token", ""))
    end = form.end_of_turn_id if eos is None else eos
    ids += [end] if ids[-1:] != [end] else []
    if len(ids) < 2:
        raise DataError("the text has no token to predict")
    return Encoded(tuple(ids), tuple(ids), conversation)


def _answer(conversation: Conversation, index: int, whole: str, form: PromptFormat) -> _Answer:
    """The answer at `index` as a server prompts it and as the template writes it at the end of its row."""
    turns, tools = conversation.turns, conversation.tools
    messages = _messages(turns[: index + 1], form.template)
    prompt = form.template.render(messages[:-1], add_generation_prompt=True, tools=tools)
    text = whole if index == len(turns) - 1 else form.template.render(messages, tools=tools)
    follows = text.startswith(prompt)
    if shown.opens_thinking(prompt):
        # An empty thinking that the template writes by itself may merge with the prompt's last characters.
        merges = follows and not shown.has_thinking(turns[index]) and not _begins(text, prompt, form)
        if not follows or merges or shown.opens_with_thinking(text[len(prompt) :]):
            # The template cannot show it so; what the model is to generate is known all the same.
            rest = shown.after_opened(turns[index], index, form.template)
            return _Answer(index, prompt, rest + form.end_of_turn)
    if not follows:
        shown.check_prompt(conversation, text, form.template)
        shown.check_turn(turns[index], index, text, form.template)
        raise DataError(
            "the prompt is not a prefix of the conversation: the template begins an answer otherwise than "
            "its generation prompt",
            hint="these answers have thinking, which train.template_variables turns off"
            if shown.closes_thinking(prompt) and shown.has_thinking(turns[index])
            else "use a chat template whose add_generation_prompt ends where an answer begins",
        )
    answer = text[len(prompt) :]
    content_ends = shown.check_turn(turns[index], index, answer, form.template)
    closing_at = answer.find(form.end_of_turn, content_ends)
    if closing_at < 0:
        what = "the call" if turns[index].tool_calls else "the answer"
        raise DataError(
            f"{what} of message {index} ends with {answer[content_ends:].strip()[:40]!r}, not with "
            f"{form.end_of_turn}: a server would not stop there",
            hint="leave these rows out, or use a template that ends every answer alike",
        )
    return _Answer(index, prompt, answer[: closing_at + len(form.end_of_turn)])


def _messages(turns: Sequence[Turn], template: ChatTemplate) -> list[dict[str, Json]]:
    """What the template is given; some (gpt-oss) read the thinking by another name."""
    messages = [turn.as_message() for turn in turns]
    if ".thinking" in template.source:
        for turn, message in zip(turns, messages, strict=True):
            if turn.reasoning:
                message["thinking"] = turn.reasoning
    return messages


def _begins(text: str, prompt: str, form: PromptFormat) -> bool:
    """Whether the ids of `prompt` are a prefix of those of `text`."""
    alone = form.ids(prompt)
    return form.ids(text)[: len(alone)] == alone


def _prefix_length(prefix: str, ids: list[int], form: PromptFormat) -> int:
    alone = form.ids(prefix)
    if ids[: len(alone)] != alone:
        raise DataError(
            "the prompt's token ids are not a prefix of the row's: "
            "its last characters merge with the answer's first"
        )
    return len(alone)
