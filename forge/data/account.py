"""The account of what was read and made of it: figures of the rows, notes, one row as the model sees it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from forge.data.problems import BadRows, grouped
from forge.data.prompt_format import PromptFormat
from forge.data.reading import Read
from forge.data.texts import Notes

_FEW_ROWS = 50


def notes_of(reads: Sequence[Read]) -> Notes:
    """Of all sources together."""
    together = Notes()
    for part in reads:
        together.counts.update(part.reading.notes.counts)
        together.unused.update(part.reading.notes.unused)
        together.roles.update(part.reading.notes.roles)
    return together


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
class KeptRows:
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


def account_of(
    reads: Sequence[Read], bad: BadRows, kept: KeptRows, *, heldout: int, duplicates: int, first: Shown
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


def shown_row(ids: Sequence[int], labels: Sequence[int], form: PromptFormat) -> Shown:
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
