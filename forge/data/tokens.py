"""Conversations to token ids and loss mask, before and apart from any training library.

Each answer is learned after the prompt that a server gives the model for it. Where the row's text holds
every answer so, the row is encoded once; where the template writes earlier turns otherwise once the
conversation goes on (it leaves out their thinking, say), each answer becomes a row of its own.
What must hold for that is checked, not assumed: the prompt is a prefix of the row, in text and in
ids (pitfall 50); the end of turn is in the loss (pitfall 27, 28); the mask is not empty (pitfall 16);
what the row holds is in the text (`shown`).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile

from forge import report
from forge.data import control, shown
from forge.data.conversation import Conversation
from forge.data.problems import BadRows
from forge.data.prompt_format import EncodedText, PromptFormat
from forge.data.rendered import Asked, Texts, rendered_all
from forge.errors import DataError, Problem

IGNORED = -100  # the label that torch's cross-entropy leaves out
_ONE_EACH = (
    "made of the answers of rows with several: the template writes earlier turns otherwise than the last, "
    "and a server prompts each answer so"
)
_IN_TWO_PIECES = "whose answer merges with the prompt's end: encoded in two pieces, as a server has them"
_SAME_PROMPT = "have variables of the chat template, which write what the model is served with"
_BATCH_ROWS, _BATCH_CHARACTERS = 256, 4_000_000
_CUT_THINKING = "the template leaves out the thinking of earlier answers, as it does when the model is served"


@dataclass(frozen=True)
class Encoded:
    """One row: ids, and labels of the same length with `IGNORED` where there is no loss."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    conversation: Conversation
    notes: tuple[str, ...] = ()
    """What encoding made of the row, for the account of all rows."""
    rejected: Encoded | None = None
    """Of a preference pair: the same prompt with the answer that was rejected."""

    @property
    def supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the first that carries loss."""
        pairs = zip(self.input_ids, self.labels, strict=True)
        return tuple(number for number, _ in takewhile(lambda pair: pair[1] == IGNORED, pairs))

    @property
    def tokens(self) -> int:
        """The length of the row, of the longer one of a pair."""
        return max(len(self.input_ids), len(self.rejected.input_ids) if self.rejected else 0)


def encode_all(
    conversations: Sequence[Conversation],
    form: PromptFormat,
    *,
    supervise: str = "all",
    bad: BadRows | None = None,
) -> list[Encoded]:
    """The rows of all conversations; raises as `encode_each` does."""
    each = encode_each(conversations, form, supervise=supervise, bad=bad)
    return [row for _, rows in report.track("encode rows", each, len(conversations)) for row in rows]


def encode_each(
    conversations: Iterable[Conversation],
    form: PromptFormat,
    *,
    supervise: str = "all",
    bad: BadRows | None = None,
) -> Iterator[tuple[Conversation, Sequence[Encoded]]]:
    """Each conversation that can be encoded, in order, with the rows that it becomes.

    They are several where the template rewrites earlier turns (`Encoded.notes` of each says so). Raises one
    `DataError` at the end, which names every row that cannot be encoded; `bad` says how many may be left out
    instead.
    """
    problems: list[Problem] = []
    hints: dict[str, None] = {}
    count, is_pair, is_known = 0, False, False
    for asked, rows in _pipeline(_batches(conversations, form, supervise), form):
        is_second = is_pair and not asked.conversation.rejected  # a pair is two conversations of one row
        is_pair = bool(asked.conversation.rejected)
        count += not is_second
        is_known = is_known and is_second
        if isinstance(rows, DataError):
            problems += [] if is_known else [asked.conversation.place.problem(rows.message)]
            hints |= {rows.hint: None} if rows.hint else {}
            is_known = True
        else:
            yield asked.conversation, rows
    (bad or BadRows()).settle(
        problems,
        f"{len(problems)} of {count} rows cannot be encoded with this base's template",
        "; ".join(hints) or "fix these rows, or leave them out",
    )


def _batches(
    conversations: Iterable[Conversation], form: PromptFormat, supervise: str
) -> Iterator[list[Asked]]:
    batch: list[Asked] = []
    size = 0
    for conversation in conversations:
        asked = _asked(conversation, form, supervise)
        batch.append(asked)
        size += len(conversation.text) + (1 + 2 * len(asked.looked_at)) * sum(
            len(turn.content) + len(turn.reasoning) for turn in conversation.turns
        )
        if len(batch) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pipeline(
    batches: Iterator[list[Asked]], form: PromptFormat
) -> Iterator[tuple[Asked, Sequence[Encoded] | DataError]]:
    """What becomes of each row. Three things go on at once: a batch is rendered, in its own process, one is
    encoded, without Python's lock, and the masks of a third are made here.
    """
    with ThreadPoolExecutor(1) as rendering, ThreadPoolExecutor(1) as encoding:
        rendered: deque[tuple[list[Asked], Future[list[Texts]]]] = deque()
        encoded: deque[tuple[list[_Drafted], Future[list[list[int]]]]] = deque()
        while True:
            while len(rendered) < 2 and (batch := next(batches, None)) is not None:
                rendered.append((batch, rendering.submit(rendered_all, batch, form)))
            if rendered:
                batch, texts = rendered.popleft()
                drafted = [_drafted(*pair, form) for pair in zip(batch, texts.result(), strict=True)]
                encoded.append((drafted, encoding.submit(_ids, drafted, form)))
            if encoded and (len(encoded) > 1 or not rendered):
                drafted, ids = encoded.popleft()
                yield from _finished(drafted, iter(ids.result()), form)
            elif not rendered:
                return


def _drafted(asked: Asked, texts: Texts, form: PromptFormat) -> _Drafted:
    try:
        return asked, _drafts(asked, texts, form)
    except DataError as error:
        return asked, error


def _ids(drafted: Sequence[_Drafted], form: PromptFormat) -> list[list[int]]:
    """Those of every draft, in order."""
    return form.ids_of_all(
        [draft.text for _, drafts in drafted if not isinstance(drafts, DataError) for draft in drafts]
    )


def _finished(
    drafted: Sequence[_Drafted], ids: Iterator[list[int]], form: PromptFormat
) -> Iterator[tuple[Asked, Sequence[Encoded] | DataError]]:
    for asked, drafts in drafted:
        if isinstance(drafts, DataError):
            yield asked, drafts
            continue
        own = [(draft, next(ids)) for draft in drafts]
        try:
            rows = [row for draft, its_ids in own for row in _rows(draft, its_ids, form)]
            yield asked, rows if asked.conversation.turns else [_text(asked.conversation, form)]
        except DataError as error:
            yield asked, error


@dataclass(frozen=True)
class _Answer:
    """One answer as it is learned: the `prompt` a server gives, and the answer up to its end of turn."""

    index: int
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class _Draft:
    """A row as text: up to the end of the last answer that is learned.

    What follows an end of turn (a newline, say) is never generated: the server has stopped.
    """

    conversation: Conversation
    learned: Sequence[_Answer]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.learned[-1].text


_Drafted = tuple[Asked, Sequence[_Draft] | DataError]


def _asked(conversation: Conversation, form: PromptFormat, supervise: str) -> Asked:
    turns = conversation.turns
    if not turns:
        return Asked(conversation)
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    try:
        for index in answers:
            control.check_answer(turns[index], form)
        asked = [
            index
            for index in (answers if supervise == "all" else answers[-1:])
            if turns[index].trained is not False
        ]
        if not asked:
            raise DataError("no answer of the row carries loss: its own weight or train leaves them out")
    except DataError as error:
        return Asked(conversation, error=error)
    # An answer that only calls tools could be left out without a trace, so each is looked at.
    looked_at = sorted({*asked, *(index for index in answers if turns[index].tool_calls)})
    return Asked(conversation, asked, looked_at)


def _drafts(asked: Asked, texts: Texts, form: PromptFormat) -> Sequence[_Draft]:
    conversation = asked.conversation
    if asked.error is not None:
        raise asked.error
    if not conversation.turns:
        return []
    notes = _of_variables(conversation, texts, form)
    whole = texts.of(len(conversation.turns), False)
    learned = [_answer(conversation, index, texts, form) for index in asked.looked_at]
    shown.check_prompt(conversation, whole, texts.without_tools)
    learned = [answer for answer in learned if answer.index in asked.learned]
    if len(learned) == 1 or all(
        whole.startswith(answer.text) and not control.in_answer(conversation.turns[answer.index], form)
        for answer in learned
    ):
        return [_draft(conversation, learned, form, *notes)]
    return _one_each(conversation, learned, form, *notes)


def _of_variables(conversation: Conversation, texts: Texts, form: PromptFormat) -> list[str]:
    """What is to be said of the template's variables that a row has: a server has the recipe's, always."""
    variables = conversation.variables
    if variables is None:
        return []
    without = f"data.ignore: [{variables.column}]"
    unread = [
        name
        for name, value in variables.values.items()
        if value and not isinstance(value, bool) and name not in form.template.names
    ]
    if unread:
        raise DataError(
            f"{variables.column} has {', '.join(unread)}, which the chat template does not read",
            hint=f"{without} trains without it",
        )
    if texts.own:
        own = ", ".join(f"{name}: {json.dumps(value)}" for name, value in texts.own.items())
        raise DataError(
            f"{variables.column} ({own}) prompts otherwise than the model is served",
            hint=f"train.template_variables: {{{own}}} trains and serves the model so, and rows that have it "
            f"otherwise are another model's; {without} renders every row as the model is served",
        )
    return [_SAME_PROMPT]


def _one_each(
    conversation: Conversation, learned: Sequence[_Answer], form: PromptFormat, *notes: str
) -> list[_Draft]:
    """Each answer as a row of its own."""
    return [
        _draft(_up_to(conversation, answer.index), [answer], form, *notes, _ONE_EACH) for answer in learned
    ]


def _draft(conversation: Conversation, learned: Sequence[_Answer], form: PromptFormat, *notes: str) -> _Draft:
    last = learned[-1]
    if not shown.earlier_thinking(conversation.turns[: last.index], last.prompt):
        notes = (*notes, _CUT_THINKING)
    if control.in_prompt(conversation, last.index, form):
        notes = (*notes, control.IN_PROMPT)
    return _Draft(conversation, learned, notes)


def _up_to(conversation: Conversation, index: int) -> Conversation:
    """The conversation that ends with the answer at `index`, the only one that carries loss."""
    before = (
        replace(turn, trained=False) if turn.role == "assistant" else turn
        for turn in conversation.turns[:index]
    )
    return replace(conversation, turns=(*before, conversation.turns[index]))


def _rows(draft: _Draft, ids: list[int], form: PromptFormat) -> list[Encoded]:
    """The ids and labels of a draft; several rows where an answer must be encoded apart from its prompt."""
    if form.bos_id is not None and ids[:2] == [form.bos_id] * 2:
        raise DataError("the row begins with BOS twice: the template writes one that is there already")
    encoded = EncodedText(draft.text, ids, form)
    labels = [IGNORED] * len(ids)
    for learned in draft.learned:
        if control.in_answer(draft.conversation.turns[learned.index], form):
            return [_in_two_pieces(draft, ids, form, control.IN_ANSWER)]
        start = encoded.tokens_of(learned.prompt)
        if start is None and len(draft.learned) > 1:
            # What the server sends of an earlier answer is its text, so only the last can be in two pieces.
            apart = _one_each(draft.conversation, draft.learned, form)
            texts = form.ids_of_all([each.text for each in apart])
            return [
                row for each, its_ids in zip(apart, texts, strict=True) for row in _rows(each, its_ids, form)
            ]
        if start is None:
            return [_in_two_pieces(draft, ids, form, _IN_TWO_PIECES)]
        end = len(ids) if learned is draft.learned[-1] else encoded.tokens_of(learned.text)
        if end is None or ids[end - 1] != form.end_of_turn_id:
            raise DataError(f"the end of turn {form.end_of_turn} is not one token at the end of the answer")
        if end <= start + 1:
            raise DataError("the answer has no token of its own")
        labels[start:end] = ids[start:end]
    return [Encoded(tuple(ids), tuple(labels), draft.conversation, draft.notes)]


def _in_two_pieces(draft: _Draft, whole: Sequence[int], form: PromptFormat, why: str) -> Encoded:
    """The prompt's own ids, then the answer's: what a model is given and what it then generates."""
    (learned,) = draft.learned
    prompt = form.ids(learned.prompt)
    answer = control.answer_ids(learned.answer, draft.conversation.turns[learned.index], form)
    ids = [*prompt, *answer]
    decode = form.tokenizer.decode
    is_same = decode(ids, skip_special_tokens=False) == decode(whole, skip_special_tokens=False)
    if not is_same or answer[-1:] != [form.end_of_turn_id]:
        raise DataError(
            "the prompt's token ids are not a prefix of the row's: "
            "its last characters merge with the answer's first"
        )
    labels = [*([IGNORED] * len(prompt)), *answer]
    return Encoded(tuple(ids), tuple(labels), draft.conversation, (*draft.notes, why))


def _text(conversation: Conversation, form: PromptFormat) -> Encoded:
    """A plain text: the tokenizer's own BOS, the text, EOS; all of it carries loss."""
    ids, notes = control.text_ids(conversation.text, form)
    eos = form.tokenizer.token_to_id(form.template.special_tokens.get("eos_token", ""))
    end = form.end_of_turn_id if eos is None else eos
    ids += [end] if ids[-1:] != [end] else []
    if len(ids) < 2:
        raise DataError("the text has no token to predict")
    return Encoded(tuple(ids), tuple(ids), conversation, notes)


def _answer(conversation: Conversation, index: int, texts: Texts, form: PromptFormat) -> _Answer:
    """The answer at `index` as a server prompts it and as the template writes it at the end of its row."""
    turns = conversation.turns
    prompt, text = texts.of(index, True), texts.of(index + 1, False)
    follows = text.startswith(prompt)
    if shown.opens_thinking(prompt):
        # An empty thinking that the template writes by itself may merge with the prompt's last characters.
        merges = (
            follows
            and not shown.has_thinking(turns[index])
            and EncodedText(text, form.ids(text), form).tokens_of(prompt) is None
        )
        if not follows or merges or shown.opens_with_thinking(text[len(prompt) :]):
            # The template cannot show it so; what the model is to generate is known all the same.
            rest = shown.after_opened(turns[index], index, form.template)
            return _Answer(index, prompt, rest + form.end_of_turn)
    if not follows:
        shown.check_prompt(conversation, text, texts.without_tools)
        shown.check_turn(turns[index], index, text, form.template)
        if index and turns[index - 1].role == "assistant":
            raise DataError(
                f"message {index} (assistant) follows another answer: no server is asked for a second",
                hint="join the answers, or leave these rows out",
            )
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
