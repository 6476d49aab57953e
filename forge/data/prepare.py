"""The pre-flight: from files to `train.jsonl` and `heldout.jsonl` of ids, labels and messages.

Runs without torch, in seconds, before anything long starts; all that can be wrong with the data
is wrong here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NotRequired, TypedDict

from forge import report
from forge.codec import Json
from forge.data.conversation import Conversation
from forge.data.pairs import encode_pairs
from forge.data.problems import BadRows, grouped, refuse
from forge.data.prompt_format import PromptFormat
from forge.data.reading import Read, Source, read
from forge.data.split import refuse_overlap, split, weighted
from forge.data.tokens import Encoded, encode_all
from forge.data.turns import Notes
from forge.errors import DataError

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
_FEW_ROWS = 50
_LOOKED_AT = 200


@dataclass(frozen=True)
class Settings:
    """What the recipe says of the data; `heldout` is a share, a number of rows or a file."""

    sources: Sequence[Source]
    heldout: float | int | Path
    seed: int = 42
    limit: int | None = None
    overlong: str = "error"
    max_length: int | None = None
    supervise: str = "all"
    skip_bad_rows: int = 0

    @property
    def pairs(self) -> bool:
        """Whether the rows are preference pairs, of which both answers are wanted."""
        return any(source.shape.pairs for source in self.sources)


@dataclass(frozen=True)
class Rows:
    """What was read: training and held-out conversations, and the account of it."""

    training: Sequence[Conversation]
    heldout: Sequence[Conversation]
    reads: Sequence[Read]
    bad: BadRows

    @property
    def notes(self) -> Notes:
        """Of all sources together."""
        together = Notes()
        for one in self.reads:
            together.counts.update(one.reading.notes.counts)
            together.unused.update(one.reading.notes.unused)
            together.roles.update(one.reading.notes.roles)
        return together


class PreparedRow(TypedDict):
    """A line of both files: ids, labels (-100 where nothing is learned) and the messages that they are of.

    Rows to compare a base on, without a chat template, have no labels. `answers` is how many turns are
    learned, where that is not all of the assistant's. A preference pair has the rejected answer beside it,
    after the same prompt.
    """

    input_ids: Sequence[int]
    labels: NotRequired[Sequence[int]]
    messages: Sequence[Mapping[str, Json]]
    tools: NotRequired[Sequence[Mapping[str, Json]]]
    answers: NotRequired[int]
    rejected_ids: NotRequired[Sequence[int]]
    rejected_labels: NotRequired[Sequence[int]]


@dataclass(frozen=True)
class Shown:
    """A row as the model sees it, with ⟦what carries loss⟧, and only that."""

    text: str
    masked: str
    supervised: str


@dataclass(frozen=True)
class Account:
    """What was read, and the figures of the rows to train on; `notes` and `unused` count rows."""

    rows: int
    heldout_rows: int
    longest_tokens: int
    shortest_tokens: int
    median_tokens: int
    mean_tokens: float
    tokens: int
    supervised_tokens: int
    texts: int
    duplicates: int
    read: tuple[str, ...]
    notes: Mapping[str, int]
    roles: Mapping[str, str]
    unused: Mapping[str, int]
    bad_rows: tuple[str, ...]
    first_row: Shown


@dataclass(frozen=True)
class Looked(Account):
    """An account of which the tokens are those of the first `looked_at` rows only."""

    looked_at: int


@dataclass(frozen=True)
class Prepared(Account):
    """What the two files hold: no row is longer than `max_length` tokens."""

    overlong_rows: int
    max_length: int
    end_of_turn: str
    end_of_turn_id: int


def prepare(settings: Settings, form: PromptFormat, context: int | None, out: Path) -> Prepared:
    """Write both files into `out` and return what they hold.

    `context` is the base's number of positions. Raises `DataError` with every problem at once.
    """
    read_rows = read_all(settings)
    rows = _encoded(read_rows.training, form, settings, read_rows.bad)
    held = _encoded(read_rows.heldout, form, settings, read_rows.bad)
    if not rows:
        raise DataError("no row is left to train on", hint="see what was left out above")
    longest = max(row.tokens for row in [*rows, *held])
    limit = settings.max_length or min(longest, context or longest)
    if context and limit > context:
        raise DataError(
            f"train.max_length: {limit} tokens is more than the base's {context} positions",
            hint=f"at most {context}; the longest row has {longest} tokens",
        )
    kept, held, changed = _fit(rows, limit, settings), _fit(held, limit, settings), _overlong(rows, limit)
    if not kept:
        raise DataError("no row is short enough to train on", hint=f"raise train.max_length above {limit}")
    _write(out / TRAIN_FILE, kept)
    _write(out / HELDOUT_FILE, held)
    return Prepared(
        **vars(_account(read_rows, kept, len(held), form)),
        overlong_rows=changed,
        max_length=limit,
        end_of_turn=form.end_of_turn,
        end_of_turn_id=form.end_of_turn_id,
    )


def _encoded(
    conversations: Sequence[Conversation], form: PromptFormat, settings: Settings, bad: BadRows
) -> list[Encoded]:
    if settings.pairs:
        return encode_pairs(conversations, form, bad)
    return encode_all(conversations, form, supervise=settings.supervise, bad=bad)


def _account(rows: Rows, kept: Sequence[Encoded], heldout: int, form: PromptFormat) -> Account:
    """The account of what was read, and the figures of the rows that are `kept`."""
    lengths = sorted(row.tokens for row in kept)
    notes = rows.notes
    notes.counts.update(note for row in kept for note in row.notes)
    return Account(
        rows=len(kept),
        heldout_rows=heldout,
        longest_tokens=lengths[-1],
        shortest_tokens=lengths[0],
        median_tokens=lengths[len(lengths) // 2],
        mean_tokens=round(sum(lengths) / len(lengths), 1),
        tokens=sum(lengths),
        supervised_tokens=sum(row.supervised for row in kept),
        texts=sum(not row.conversation.turns for row in kept),
        duplicates=len({id(row) for row in rows.training}) - len({row.fingerprint for row in rows.training}),
        read=tuple(part.line for part in rows.reads),
        notes=dict(notes.counts),
        roles=notes.roles,
        unused=dict(notes.unused),
        bad_rows=tuple(str(problem) for problem in grouped(rows.bad.skipped)),
        first_row=_shown(kept[0], form),
    )


def lines_of(account: Account) -> Iterator[str]:
    """What was read and made of it, in a few lines."""
    yield from (f"read {line}" for line in account.read)
    same = f", {account.duplicates:,} of them the same as another" if account.duplicates else ""
    yield f"rows: {account.rows:,} to train on{same}; {account.heldout_rows:,} held out"
    share = account.supervised_tokens / account.tokens
    yield (
        f"tokens a row: {account.shortest_tokens:,} to {account.longest_tokens:,}, "
        f"median {account.median_tokens:,}; {share:.0%} of {account.tokens:,} carry loss"
    )
    if account.texts:
        yield "plain text is learned whole: it teaches to go on with such a text, not to answer in a chat"
    if isinstance(account, Looked) and account.looked_at < account.rows:
        yield f"(tokens are those of the first {account.looked_at} rows)"
    yield from (f"{number:,} rows: {note}" for note, number in account.notes.items())
    if account.roles:
        yield "roles: " + ", ".join(f"{name} is the {role}" for name, role in account.roles.items())
    if account.unused:
        yield "not used: " + ", ".join(account.unused)
    if account.rows < _FEW_ROWS:
        yield f"under {_FEW_ROWS} rows teach a format or a tone at most; some hundred good ones teach a task"


def look_at_data(settings: Settings, form: PromptFormat) -> Looked:
    """What was read and the first row as the model will see it, for a plan: writes nothing.

    All rows are read, the first few encoded. Raises `DataError` as `prepare` would of those.
    """
    rows = read_all(settings)
    some = _encoded(rows.training[:_LOOKED_AT], form, settings, rows.bad)
    if not some:
        raise DataError("no row is left to train on", hint="see what was left out above")
    account = dataclasses.replace(_account(rows, some, len(rows.heldout), form), rows=len(rows.training))
    return Looked(**vars(account), looked_at=len(some))


def read_all(settings: Settings) -> Rows:
    """What reading the rows gives, without a tokenizer; raises `DataError` as `prepare` would."""
    bad = BadRows(settings.skip_bad_rows)
    reads = [read(source, limit=settings.limit, bad=bad) for source in settings.sources]
    rows = [one for part in reads for one in part.conversations][: settings.limit]
    if isinstance(settings.heldout, Path):
        shape = settings.sources[0]
        asked = read(
            dataclasses.replace(shape, files=(settings.heldout,), split="train", weight=1.0), bad=bad
        )
        refuse_overlap(rows, asked.conversations)
        training, heldout = rows, list(asked.conversations)
        reads.append(asked)
    else:
        training, heldout = split(rows, settings.heldout, settings.seed)
    return Rows(weighted(training, settings.seed), heldout, reads, bad)


def _overlong(rows: Sequence[Encoded], limit: int) -> int:
    return sum(row.tokens > limit for row in rows)


def _fit(rows: Sequence[Encoded], limit: int, settings: Settings) -> list[Encoded]:
    """Rows of at most `limit` tokens; longer ones are an error, dropped or cut, as the recipe says."""
    too_long = [row for row in rows if row.tokens > limit]
    if not too_long:
        return list(rows)
    texts = sum(not row.conversation.turns for row in too_long)
    if settings.overlong == "error" or (settings.overlong == "chunk" and texts < len(too_long)):
        ways = "drop or truncate" + (", or to chunk" if texts == len(too_long) else "")
        refuse(
            [row.conversation.place.problem(f"{row.tokens} tokens, {limit} fit") for row in too_long],
            f"{len(too_long)} rows are longer than {limit} tokens",
            f"raise train.max_length, or set data.overlong to {ways}",
        )
    if settings.overlong == "chunk":
        return [piece for row in rows for piece in _pieces(row, limit)]
    many = f"{len(too_long)} of {len(rows)} rows are longer than {limit} tokens"
    if settings.overlong == "drop":
        report.warning(f"{many} and were left out")
        return [row for row in rows if row.tokens <= limit]
    cut = [
        dataclasses.replace(row, input_ids=row.input_ids[:limit], labels=row.labels[:limit]) for row in rows
    ]
    left = [row for row in cut if row.supervised]
    gone = len(cut) - len(left)
    said = f"{len(too_long) - gone} were cut, without their end of turn"
    if gone:
        said += f", and {gone} had no answer left and were left out"
    report.warning(f"{many}: {said}")
    return left


def _pieces(row: Encoded, limit: int) -> Iterator[Encoded]:
    for start in range(0, len(row.input_ids), limit):
        ids = row.input_ids[start : start + limit]
        if len(ids) > 1:  # one token alone predicts nothing
            yield Encoded(ids, row.labels[start : start + limit], row.conversation)


def _write(path: Path, rows: Sequence[Encoded]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            line = PreparedRow(
                input_ids=row.input_ids, labels=row.labels, messages=row.conversation.messages()
            )
            if row.conversation.tools:
                line["tools"] = row.conversation.tools
            if any(turn.trained is False for turn in row.conversation.turns):
                line["answers"] = sum(
                    turn.role == "assistant" and turn.trained is not False for turn in row.conversation.turns
                )
            if row.rejected:
                line |= {"rejected_ids": row.rejected.input_ids, "rejected_labels": row.rejected.labels}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _shown(row: Encoded, form: PromptFormat) -> Shown:
    """The first row as the model sees it, and the part that carries loss (requirement F9)."""
    decode = form.tokenizer.decode
    pieces = []
    for learned, run in groupby(zip(row.input_ids, row.labels, strict=True), lambda pair: pair[1] >= 0):
        text = decode([number for number, _ in run], skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if learned else text)
    return Shown(
        text=decode(list(row.input_ids), skip_special_tokens=False),
        masked="".join(pieces),
        supervised=decode([label for label in row.labels if label >= 0], skip_special_tokens=False),
    )
