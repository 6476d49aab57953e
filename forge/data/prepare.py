"""The pre-flight: from files to `train.jsonl` and `heldout.jsonl` of ids, labels and messages.

Runs without torch, in seconds, before anything long starts; all that can be wrong with the data
is wrong here.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NotRequired, TypedDict

from forge import report
from forge.codec import Json
from forge.data.account import KeptRows, Looked, Prepared, account_of, shown_row
from forge.data.conversation import Conversation
from forge.data.overlong import Fit
from forge.data.pairs import encode_pairs
from forge.data.problems import BadRows
from forge.data.prompt_format import PromptFormat
from forge.data.reading import Read, Source, read, refuse_absent, refuse_unheard
from forge.data.split import held_out, refuse_overlap, refuse_same, split, times, weighted
from forge.data.spool import Spool
from forge.data.tokens import Encoded, encode_each
from forge.errors import DataError

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
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
    account = account_of(
        reads,
        bad,
        kept,
        heldout=held_rows,
        duplicates=len(trained) - len(set(trained)),
        first=shown_row(first["input_ids"], first["labels"], form),
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
) -> tuple[KeptRows, int]:
    """Write both files; the figures of the first, and the rows of the other."""
    kept, held_rows = KeptRows(), 0
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


def look_at_data(settings: Settings, form: PromptFormat) -> Looked:
    """What was read and the first row as the model will see it, for a plan: writes nothing.

    All rows are read, the first few encoded. Raises `DataError` as `prepare` would of those.
    """
    rows = read_all(settings)
    looked = rows.training[:_LOOKED_AT]
    some = [row for _, made in _encoded(looked, form, settings, rows.bad) for row in made]
    if not some:
        raise DataError("no row is left to train on", hint="see what was left out above")
    kept = KeptRows()
    for row in some:
        kept.add(row.tokens, row.supervised, not row.conversation.turns, row.notes)
    account = account_of(
        rows.reads,
        rows.bad,
        kept,
        heldout=len(rows.heldout),
        duplicates=len({id(row) for row in rows.training}) - len({row.fingerprint for row in rows.training}),
        first=shown_row(some[0].input_ids, some[0].labels, form),
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
