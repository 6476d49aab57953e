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
from typing import Any

from forge import report
from forge.data.conversation import Conversation
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


def prepare(settings: Settings, form: PromptFormat, context: int | None, out: Path) -> dict[str, Any]:
    """Write both files into `out` and return what they hold.

    `context` is the base's number of positions. Raises `DataError` with every problem at once.
    """
    read_rows = read_all(settings)
    rows = encode_all(read_rows.training, form, supervise=settings.supervise, bad=read_rows.bad)
    held = encode_all(read_rows.heldout, form, supervise=settings.supervise, bad=read_rows.bad)
    if not rows:
        raise DataError("no row is left to train on", hint="see what was left out above")
    longest = max(len(row.input_ids) for row in [*rows, *held])
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
    return {
        **_facts(read_rows, kept, len(held)),
        "overlong_rows": changed,
        "max_length": limit,
        "end_of_turn": form.end_of_turn,
        "end_of_turn_id": form.end_of_turn_id,
        "first_row": _shown(kept[0], form),
    }


def _facts(rows: Rows, kept: Sequence[Encoded], heldout: int) -> dict[str, Any]:
    """The account of what was read, and the figures of the rows that are `kept`."""
    lengths = sorted(len(row.input_ids) for row in kept)
    notes = rows.notes
    notes.counts.update(note for row in kept for note in row.notes)
    return {
        "rows": len(kept),
        "heldout_rows": heldout,
        "longest_tokens": lengths[-1],
        "shortest_tokens": lengths[0],
        "median_tokens": lengths[len(lengths) // 2],
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "tokens": sum(lengths),
        "supervised_tokens": sum(row.supervised for row in kept),
        "texts": sum(not row.conversation.turns for row in kept),
        "duplicates": len({id(one) for one in rows.training})
        - len({one.fingerprint for one in rows.training}),
        "read": [one.line for one in rows.reads],
        "notes": dict(notes.counts),
        "roles": notes.roles,
        "unused": dict(notes.unused),
        "bad_rows": [str(problem) for problem in grouped(rows.bad.skipped)],
    }


def account(facts: Mapping[str, Any]) -> Iterator[str]:
    """What was read and made of it, in a few lines."""
    yield from (f"read {line}" for line in facts["read"])
    same = f", {facts['duplicates']:,} of them the same as another" if facts["duplicates"] else ""
    yield f"rows: {facts['rows']:,} to train on{same}; {facts['heldout_rows']:,} held out"
    share = facts["supervised_tokens"] / facts["tokens"]
    yield (
        f"tokens a row: {facts['shortest_tokens']:,} to {facts['longest_tokens']:,}, "
        f"median {facts['median_tokens']:,}; {share:.0%} of {facts['tokens']:,} carry loss"
    )
    if facts["texts"]:
        yield "plain text is learned whole: it teaches to go on with such a text, not to answer in a chat"
    if facts.get("looked_at", facts["rows"]) < facts["rows"]:
        yield f"(tokens are those of the first {facts['looked_at']} rows)"
    yield from (f"{number:,} rows: {note}" for note, number in facts["notes"].items())
    if facts["roles"]:
        yield "roles: " + ", ".join(f"{name} is the {role}" for name, role in facts["roles"].items())
    if facts["unused"]:
        yield "not used: " + ", ".join(facts["unused"])
    if facts["rows"] < _FEW_ROWS:
        yield f"under {_FEW_ROWS} rows teach a format or a tone at most; some hundred good ones teach a task"


def look(settings: Settings, form: PromptFormat) -> dict[str, Any]:
    """What was read and the first row as the model will see it, for a plan: writes nothing.

    All rows are read, the first few encoded. Raises `DataError` as `prepare` would of those.
    """
    rows = read_all(settings)
    some = encode_all(rows.training[:_LOOKED_AT], form, supervise=settings.supervise, bad=rows.bad)
    if not some:
        raise DataError("no row is left to train on", hint="see what was left out above")
    facts = _facts(rows, some, len(rows.heldout))
    return {**facts, "rows": len(rows.training), "looked_at": len(some), "first_row": _shown(some[0], form)}


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
    return sum(len(row.input_ids) > limit for row in rows)


def _fit(rows: Sequence[Encoded], limit: int, settings: Settings) -> list[Encoded]:
    """Rows of at most `limit` tokens; longer ones are an error, dropped or cut, as the recipe says."""
    too_long = [row for row in rows if len(row.input_ids) > limit]
    if not too_long:
        return list(rows)
    texts = sum(not row.conversation.turns for row in too_long)
    if settings.overlong == "error" or (settings.overlong == "chunk" and texts < len(too_long)):
        ways = "drop or truncate" + (", or to chunk" if texts == len(too_long) else "")
        refuse(
            [row.conversation.place.problem(f"{len(row.input_ids)} tokens, {limit} fit") for row in too_long],
            f"{len(too_long)} rows are longer than {limit} tokens",
            f"raise train.max_length, or set data.overlong to {ways}",
        )
    if settings.overlong == "chunk":
        return [piece for row in rows for piece in _pieces(row, limit)]
    many = f"{len(too_long)} of {len(rows)} rows are longer than {limit} tokens"
    if settings.overlong == "drop":
        report.warning(f"{many} and were left out")
        return [row for row in rows if len(row.input_ids) <= limit]
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
            line: dict[str, Any] = {
                "input_ids": row.input_ids,
                "labels": row.labels,
                "messages": row.conversation.messages(),
            }
            if row.conversation.tools:
                line["tools"] = row.conversation.tools
            if any(turn.trained is False for turn in row.conversation.turns):
                line["answers"] = sum(
                    turn.role == "assistant" and turn.trained is not False for turn in row.conversation.turns
                )
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _shown(row: Encoded, form: PromptFormat) -> dict[str, str]:
    """The first row as the model sees it, and the part that carries loss (requirement F9)."""
    decode = form.tokenizer.decode
    pieces = []
    for learned, run in groupby(zip(row.input_ids, row.labels, strict=True), lambda pair: pair[1] >= 0):
        text = decode([number for number, _ in run], skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if learned else text)
    return {
        "text": decode(list(row.input_ids), skip_special_tokens=False),
        "masked": "".join(pieces),
        "supervised": decode([label for label in row.labels if label >= 0], skip_special_tokens=False),
    }
