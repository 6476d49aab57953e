"""The pre-flight: from files to `train.jsonl` and `heldout.jsonl` of ids, labels and messages.

Runs without torch, in seconds, before anything long starts; all that can be wrong with the data
is wrong here.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NotRequired, TypedDict

from forge import report
from forge.codec import Json
from forge.data.conversation import Conversation
from forge.data.overlong import Fit
from forge.data.pairs import encode_pairs
from forge.data.problems import BadRows, grouped
from forge.data.prompt_format import PromptFormat
from forge.data.reading import Read, Source, read, refuse_absent, refuse_unheard
from forge.data.split import held_out, refuse_overlap, refuse_same, split, times, weighted
from forge.data.spool import Spool
from forge.data.texts import Notes
from forge.data.tokens import Encoded, encode_each
from forge.errors import DataError

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
_FEW_ROWS = 50
_BETWEEN_COLLECTIONS = 50_000
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

    @property
    def labels(self) -> bool:
        """Whether the rows may be single answers that are good or bad."""
        return any(source.shape.labels for source in self.sources)


@dataclass(frozen=True)
class ReadRows:
    """What was read: training and held-out conversations, and the account of it."""

    training: Sequence[Conversation]
    heldout: Sequence[Conversation]
    reads: Sequence[Read]
    bad: BadRows


def notes_of(reads: Sequence[Read]) -> Notes:
    """Of all sources together."""
    together = Notes()
    for part in reads:
        together.counts.update(part.reading.notes.counts)
        together.unused.update(part.reading.notes.unused)
        together.roles.update(part.reading.notes.roles)
    return together


class PreparedRow(TypedDict):
    """A line of both files: ids, labels (-100 where nothing is learned) and the messages that they are of.

    Rows to compare a base on, without a chat template, have no labels. `answers` is how many turns are
    learned, where that is not all of the assistant's. A preference pair has the rejected answer beside it,
    after the same prompt; a single answer with a label says whether it is desirable.
    """

    input_ids: Sequence[int]
    labels: NotRequired[Sequence[int]]
    messages: Sequence[Mapping[str, Json]]
    tools: NotRequired[Sequence[Mapping[str, Json]]]
    answers: NotRequired[int]
    rejected_ids: NotRequired[Sequence[int]]
    rejected_labels: NotRequired[Sequence[int]]
    desirable: NotRequired[bool]


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


@dataclass
class _Kept:
    """The figures of the rows of a file."""

    lengths: array[int] = field(default_factory=lambda: array("Q"))
    supervised: int = 0
    texts: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, tokens: int, supervised: int, is_text: bool, notes: Sequence[str]) -> None:
        self.lengths.append(tokens)
        self.supervised += supervised
        self.texts += is_text
        self.notes.update(notes)


def prepare(settings: Settings, form: PromptFormat, context: int | None, out: Path) -> Prepared:
    """Write both files into `out` and return what they hold.

    `context` is the base's number of positions. Raises `DataError` with every problem at once.
    """
    with closing(Spool(out)) as spool, _collecting_seldom():
        reads, bad, training = _encode(settings, form, spool)
        repeats = _parted(spool, training, settings)
        if not any(repeats):
            raise DataError("no row is left to train on", hint="see what was left out above")
        if settings.labels:
            _require_both(spool, repeats)
        used = [
            lengths for lengths, times in zip(spool.lengths(), repeats, strict=True) if times is None or times
        ]
        longest = max(max(lengths) for lengths in used)
        limit = settings.max_length or min(longest, context or longest)
        if context and limit > context:
            raise DataError(
                f"train.max_length: {limit} tokens is more than the base's {context} positions",
                hint=f"at most {context}; the longest row has {longest} tokens",
            )
        fits = Fit(limit, settings.overlong), Fit(limit, settings.overlong)
        if longest > limit:
            lined = report.track("measure rows", zip(spool, repeats, strict=True), len(repeats))
            for lines, count in lined:
                fits[count is None].look_at(lines, 1 if count is None else count)
            for fit in fits:
                fit.refuse()
        kept, held_rows = _write(spool, repeats, fits, out)
        for fit in fits:
            fit.warn()
        if not kept.lengths:
            raise DataError(
                "no row is short enough to train on", hint=f"raise train.max_length above {limit}"
            )
        trained = [mark for mark, count in zip(spool.marks, repeats, strict=True) if count]
    with (out / TRAIN_FILE).open(encoding="utf-8") as stream:
        first: PreparedRow = json.loads(stream.readline())
    account = _account(
        reads,
        bad,
        kept,
        heldout=held_rows,
        duplicates=len(trained) - len(set(trained)),
        first=_shown(first["input_ids"], first["labels"], form),
    )
    return Prepared(
        **vars(account),
        overlong_rows=fits[0].overlong,
        max_length=limit,
        end_of_turn=form.end_of_turn,
        end_of_turn_id=form.end_of_turn_id,
    )


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Rows are many objects without circles: to look for some at every 700 takes 8 % of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(_BETWEEN_COLLECTIONS)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _encode(settings: Settings, form: PromptFormat, spool: Spool) -> tuple[Sequence[Read], BadRows, int]:
    """Read and encode all rows into `spool`: those to train on, then those of the held-out file.

    Returns the account of what was read, and how many conversations are to train on or to be parted.
    """
    bad = BadRows(settings.skip_bad_rows)
    reads = [read(source, limit=settings.limit, bad=bad) for source in settings.sources]
    parts = [islice(chain.from_iterable(tuple(reads)), settings.limit)]
    if isinstance(settings.heldout, Path):
        reads.append(_read_heldout(settings, settings.heldout, bad))
        parts.append(islice(reads[-1], None))
    refuse_absent(reads)
    total = sum(len(part.reading.rows) for part in reads)
    ends: list[int] = []

    def encoded() -> Iterator[tuple[Conversation, Sequence[Encoded]]]:
        for part in parts:
            yield from _encoded(part, form, settings, bad)
            ends.append(len(spool.marks))

    for conversation, rows in report.track("encode rows", encoded(), total):
        spool.add(conversation, rows)
    refuse_unheard(reads)
    return reads, bad, ends[0]


def _encoded(
    conversations: Iterable[Conversation], form: PromptFormat, settings: Settings, bad: BadRows
) -> Iterator[tuple[Conversation, Sequence[Encoded]]]:
    if settings.pairs:
        return encode_pairs(conversations, form, bad)
    return encode_each(conversations, form, supervise=settings.supervise, bad=bad)


def _read_heldout(settings: Settings, path: Path, bad: BadRows) -> Read:
    shape = settings.sources[0]
    return read(dataclasses.replace(shape, files=(path,), split="train", weight=1.0), bad=bad)


def _parted(spool: Spool, training: int, settings: Settings) -> list[int | None]:
    """How often each conversation is learned; None for one that is held out."""
    marks = spool.marks
    if isinstance(settings.heldout, Path):
        known = set(marks[:training])
        refuse_same([spool.place(at) for at in range(training, len(marks)) if marks[at] in known])
        held = set(marks[training:])
    elif training:
        held = held_out(marks, settings.heldout, settings.seed)
    return [
        None if mark in held else times(weight, mark, settings.seed)
        for mark, weight in zip(marks, spool.weights, strict=True)
    ]


def _require_both(spool: Spool, repeats: Sequence[int | None]) -> None:
    """Good answers are learned from bad ones: there must be both, to train on and to measure with."""
    for what, hint in (
        ("to train on", "give answers of both kinds, or pairs"),
        ("held out", "hold more rows out (data.eval), or name a file of them"),
    ):
        judged = [
            kinds
            for kinds, count in zip(spool.judgements, repeats, strict=True)
            if (count is None) == (what == "held out") and count != 0
        ]
        lacking = {True, False} - frozenset[bool]().union(*judged)
        if judged and lacking:
            raise DataError(f"no answer {what} is {'good' if True in lacking else 'bad'}", hint=hint)


def _write(
    spool: Spool, repeats: Sequence[int | None], fits: tuple[Fit, Fit], out: Path
) -> tuple[_Kept, int]:
    """Write both files; the figures of the first, and the rows of the other."""
    kept, held_rows = _Kept(), 0
    with (out / TRAIN_FILE).open("wb") as training, (out / HELDOUT_FILE).open("wb") as heldout:
        for lines, count in report.track("write rows", zip(spool, repeats, strict=True), len(repeats)):
            if count is None:
                for line in fits[1].of(lines):
                    heldout.write(line.data)
                    held_rows += 1
            elif count:
                for line in [*fits[0].of(lines)] * count:
                    training.write(line.data)
                    kept.add(line.tokens, line.supervised, line.is_text, line.notes)
    return kept, held_rows


def _account(
    reads: Sequence[Read], bad: BadRows, kept: _Kept, *, heldout: int, duplicates: int, first: Shown
) -> Account:
    """The account of what was read, and the figures of the rows that are `kept`."""
    lengths = sorted(kept.lengths)
    notes = notes_of(reads)
    notes.counts.update(kept.notes)
    return Account(
        rows=len(lengths),
        heldout_rows=heldout,
        longest_tokens=lengths[-1],
        shortest_tokens=lengths[0],
        median_tokens=lengths[len(lengths) // 2],
        mean_tokens=round(sum(lengths) / len(lengths), 1),
        tokens=sum(lengths),
        supervised_tokens=kept.supervised,
        texts=kept.texts,
        duplicates=duplicates,
        read=tuple(part.line for part in reads),
        notes=dict(notes.counts),
        roles=notes.roles,
        unused=dict(notes.unused),
        bad_rows=tuple(str(problem) for problem in grouped(bad.skipped)),
        first_row=first,
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
    looked = rows.training[:_LOOKED_AT]
    some = [row for _, made in _encoded(looked, form, settings, rows.bad) for row in made]
    if not some:
        raise DataError("no row is left to train on", hint="see what was left out above")
    kept = _Kept()
    for row in some:
        kept.add(row.tokens, row.supervised, not row.conversation.turns, row.notes)
    account = _account(
        rows.reads,
        rows.bad,
        kept,
        heldout=len(rows.heldout),
        duplicates=len({id(row) for row in rows.training}) - len({row.fingerprint for row in rows.training}),
        first=_shown(some[0].input_ids, some[0].labels, form),
    )
    # A conversation may become several rows, and of those that were not looked at as many are expected.
    expected = round(len(rows.training) * len(some) / len(looked))
    account = dataclasses.replace(account, rows=expected)
    return Looked(**vars(account), looked_at=len(some))


def read_all(settings: Settings) -> ReadRows:
    """What reading the rows gives, without a tokenizer; raises `DataError` as `prepare` would."""
    bad = BadRows(settings.skip_bad_rows)
    reads = [read(source, limit=settings.limit, bad=bad) for source in settings.sources]
    refuse_absent(reads)
    rows = [conversation for part in reads for conversation in part.conversations][: settings.limit]
    if isinstance(settings.heldout, Path):
        reads.append(_read_heldout(settings, settings.heldout, bad))
        training, heldout = rows, list(reads[-1].conversations)
        refuse_overlap(rows, heldout)
    else:
        training, heldout = split(rows, settings.heldout, settings.seed)
    refuse_unheard(reads)
    return ReadRows(weighted(training, settings.seed), heldout, reads, bad)


def _shown(ids: Sequence[int], labels: Sequence[int], form: PromptFormat) -> Shown:
    """The first row as the model sees it, and the part that carries loss (requirement F9)."""
    decode = form.tokenizer.decode
    pieces = []
    for learned, run in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] >= 0):
        text = decode([number for number, _ in run], skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if learned else text)
    return Shown(
        text=decode(list(ids), skip_special_tokens=False),
        masked="".join(pieces),
        supervised=decode([label for label in labels if label >= 0], skip_special_tokens=False),
    )
