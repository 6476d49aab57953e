"""The pre-flight: from files to `train.jsonl` and `heldout.jsonl` of ids, labels and messages.

Runs without torch, in seconds, before anything long starts; all that can be wrong with the data
is wrong here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import report
from forge.data.conversation import Conversation
from forge.data.conversations import to_conversations
from forge.data.sources import read_rows, refuse
from forge.data.split import refuse_overlap, split
from forge.data.tokens import Encoded, PromptFormat, encode_all
from forge.errors import DataError

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"


@dataclass(frozen=True)
class Settings:
    """What the recipe says of the data; `heldout` is a share, a number of rows or a file."""

    source: Sequence[Path]
    heldout: float | int | Path
    format: str = "auto"
    columns: Mapping[str, str] | None = None
    seed: int = 42
    limit: int | None = None
    overlong: str = "error"
    max_length: int | None = None
    supervise: str = "all"


def prepare(settings: Settings, form: PromptFormat, context: int | None, out: Path) -> dict[str, Any]:
    """Write both files into `out` and return what they hold.

    `context` is the base's number of positions. Raises `DataError` with every problem at once.
    """
    training, heldout = _read(settings)
    rows = encode_all(training, form, supervise=settings.supervise)
    held = encode_all(heldout, form, supervise=settings.supervise)
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
    lengths = [len(row.input_ids) for row in kept]
    return {
        "rows": len(kept),
        "heldout_rows": len(held),
        "longest_tokens": max(lengths),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "supervised_tokens": sum(row.supervised for row in kept),
        "overlong_rows": changed,
        "max_length": limit,
        "end_of_turn": form.end_of_turn,
        "end_of_turn_id": form.end_of_turn_id,
        "first_row": _shown(kept[0], form),
    }


def look(settings: Settings) -> None:
    """Raise what reading the rows says, as `prepare` would, without a tokenizer: for a plan."""
    _read(settings)


def _read(settings: Settings) -> tuple[list[Conversation], list[Conversation]]:
    columns = settings.columns or {}
    found = [row for path in settings.source for row in read_rows(path, settings.limit)]
    rows = to_conversations(found[: settings.limit], settings.format, columns)
    if isinstance(settings.heldout, Path):
        heldout = to_conversations(read_rows(settings.heldout), settings.format, columns)
        refuse_overlap(rows, heldout)
        return rows, heldout
    return split(rows, settings.heldout, settings.seed)


def _overlong(rows: Sequence[Encoded], limit: int) -> int:
    return sum(len(row.input_ids) > limit for row in rows)


def _fit(rows: Sequence[Encoded], limit: int, settings: Settings) -> list[Encoded]:
    """Rows of at most `limit` tokens; longer ones are an error, dropped or cut, as the recipe says."""
    too_long = [row for row in rows if len(row.input_ids) > limit]
    if settings.overlong == "error":
        refuse(
            [row.conversation.place.problem(f"{len(row.input_ids)} tokens, {limit} fit") for row in too_long],
            f"{len(too_long)} rows are longer than {limit} tokens",
            "raise train.max_length, or set data.overlong to drop or truncate",
        )
    if too_long:
        done = "left out" if settings.overlong == "drop" else "cut, without their end of turn"
        report.warning(f"{len(too_long)} of {len(rows)} rows are longer than {limit} tokens and were {done}")
    if settings.overlong == "drop":
        return [row for row in rows if len(row.input_ids) <= limit]
    cut = [Encoded(row.input_ids[:limit], row.labels[:limit], row.conversation) for row in rows]
    return [row for row in cut if row.supervised]


def _write(path: Path, rows: Sequence[Encoded]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            line = {
                "input_ids": row.input_ids,
                "labels": row.labels,
                "messages": row.conversation.messages(),
            }
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _shown(row: Encoded, form: PromptFormat) -> dict[str, str]:
    """The first row as the model sees it, and the part that carries loss (requirement F9)."""
    decode = form.tokenizer.decode
    return {
        "text": decode(list(row.input_ids), skip_special_tokens=False),
        "supervised": decode([label for label in row.labels if label >= 0], skip_special_tokens=False),
    }
