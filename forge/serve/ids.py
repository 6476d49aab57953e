"""What the two files of a batch share: ids, and how a line is read.

The ids that were seen are kept in a private SQLite file, so the memory stays small.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forge.codec import JSON, RepeatedKeyError
from forge.errors import StageError

Id = str | int
# Shown of the faults of a file.
MOST_PROBLEMS = 100


class Ids:
    """Which ids stand in the prompts and the output, on the disk once they are many."""

    def __init__(self) -> None:
        # The empty name is a private file, written when its cache is full, and gone with the connection.
        self._base = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("PRAGMA cache_size = -32768")
        self._base.execute("CREATE TABLE ids (id BLOB PRIMARY KEY, line INT, answered INT) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def close(self) -> None:
        self._base.close()

    def of(self, row_id: Id) -> tuple[int | None, bool | None]:
        """The line of the prompts where it stands, and whether its answer succeeded; None for neither."""
        with _full_disk("the temporary directory"):
            row = self._base.execute(
                "SELECT line, answered FROM ids WHERE id = ?", (_key(row_id),)
            ).fetchone()
        return (None, None) if row is None else (row[0], None if row[1] is None else bool(row[1]))

    def left(self) -> int:
        """How many of the prompts seen so far have no answer."""
        sql = "SELECT count(*) FROM ids WHERE line IS NOT NULL AND answered IS NULL"
        return int(self._base.execute(sql).fetchone()[0])

    def prompt(self, row_id: Id, line: int) -> None:
        self._set("line", row_id, line)

    def answer(self, row_id: Id, succeeded: bool) -> None:
        self._set("answered", row_id, succeeded)

    def _set(self, column: str, row_id: Id, value: int) -> None:
        with _full_disk("the temporary directory"):
            insert = f"INSERT INTO ids (id, {column}) VALUES (?, ?)"
            self._base.execute(
                f"{insert} ON CONFLICT DO UPDATE SET {column} = excluded.{column}", (_key(row_id), value)
            )

    def forget(self, row_id: Id) -> None:
        """Take its answer back."""
        self._base.execute("UPDATE ids SET answered = NULL WHERE id = ?", (_key(row_id),))


def _key(row_id: Id) -> bytes:
    text = json.dumps(row_id).encode()
    return text if len(text) <= 64 else hashlib.sha256(text).digest()


@contextlib.contextmanager
def _full_disk(place: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as wrong:
        raise StageError(f"{place} cannot be written: {wrong}", hint="free some space there") from wrong


def is_stream(path: Path) -> bool:
    """Whether `path` is there and is no file: a pipe, a terminal, a device."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def parse_object(line: bytes) -> dict[str, Any]:
    """The object in a line; raises ValueError where it is none, or has a key twice."""
    try:
        fields = JSON.decode(line.decode(json.detect_encoding(line)))
    except RepeatedKeyError:
        raise
    except RecursionError as wrong:
        raise ValueError("not JSON that can be read: nested too deep") from wrong
    except ValueError as wrong:
        raise ValueError(f"not JSON: {wrong}") from wrong
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    return fields


def is_id(value: object) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)
