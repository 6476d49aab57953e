"""Rows from where people keep them: JSONL, JSON, CSV, Parquet, a hub dataset, or built in.

Not covered: streaming; all rows are read into memory (text only, so gigabytes are needed before
that matters).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.data.conversation import Place
from forge.errors import DataError, Problem

BUILTIN = Path(__file__).parent / "builtin"
BUILTIN_PREFIX = "builtin:"
_BUILTIN_FILES = {"yoda": "yoda.jsonl", "yoda_heldout": "yoda_heldout.jsonl"}
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Row:
    """One record and where it stands: the line of a JSONL file, else its number from 1."""

    values: Mapping[str, Any]
    file: str
    line: int

    @property
    def place(self) -> Place:
        return Place(self.file, self.line)

    def problem(self, message: str, field: str = "") -> Problem:
        return self.place.problem(message, field)


def locate(source: str, directory: Path) -> Path:
    """The file that `source` names: built in, absolute, or relative to `directory`.

    Raises `DataError` when there is no such file. Hub ids are resolved before (see `model.base`).
    """
    if source.startswith(BUILTIN_PREFIX):
        name = source.removeprefix(BUILTIN_PREFIX)
        if name not in _BUILTIN_FILES:
            raise DataError(
                f"data.source: there is no built-in data {source!r}",
                hint="built in are " + ", ".join(BUILTIN_PREFIX + known for known in _BUILTIN_FILES),
            )
        return BUILTIN / _BUILTIN_FILES[name]
    path = (directory / Path(source).expanduser()).resolve()
    if path.is_file():
        return path
    kind = "is a directory" if path.is_dir() else "does not exist"
    raise DataError(f"data.source: {path} {kind}", hint="name a .jsonl, .json, .csv or .parquet file")


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """All rows of a file (the first `limit`), or one `DataError` that lists every unreadable line."""
    readers: Mapping[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"data.source: {path.name}: unknown kind of file",
            hint="one of " + ", ".join(readers),
        )
    try:
        rows = list(reader(path))
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.source: {path} is not UTF-8: {error.reason} at byte {error.start}",
            hint="convert it, for instance with iconv -t utf-8",
        ) from error
    except OSError as error:
        raise DataError(f"data.source: cannot read {path}: {error.strerror}") from error
    if not rows:
        raise DataError(f"data.source: {path} has no rows", hint="training needs at least a few hundred")
    return rows[:limit] if limit else rows


def digest_of(path: Path) -> str:
    """sha256 of the file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refuse(problems: list[Problem], message: str, hint: str) -> None:
    """Raise one `DataError` with all `problems`, if there are any."""
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = problems[:_MOST_PROBLEMS]
        raise DataError(
            message + (f" (the first {_MOST_PROBLEMS} of {len(problems)} are shown)" if more > 0 else ""),
            hint=hint,
            problems=shown,
        )


def _jsonl(path: Path) -> Iterator[Row]:
    problems: list[Problem] = []
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                problems.append(Problem(f"not JSON: {error.msg}", "", path.name, number))
                continue
            if not isinstance(values, dict):
                problems.append(Problem("not an object in braces", "", path.name, number))
                continue
            rows.append(Row(values, path.name, number))
    refuse(problems, f"{path}: {len(problems)} lines are not JSON objects", "one {...} a line")
    yield from rows


def _json(path: Path) -> Iterator[Row]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else whole
    if not isinstance(whole, list) or not all(isinstance(item, dict) for item in whole):
        raise DataError(f"{path}: not a list of objects", hint='expected [{"prompt": ...}, ...]')
    yield from (Row(item, path.name, number) for number, item in enumerate(whole, start=1))


def _csv(path: Path) -> Iterator[Row]:
    problems: list[Problem] = []
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for values in reader:
                # DictReader files surplus values under None and fills missing ones with None.
                if None in values or None in values.values():
                    many = "more" if None in values else "fewer"
                    problems.append(Problem(f"{many} values than columns", "", path.name, reader.line_num))
                rows.append(Row(values, path.name, reader.line_num))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    refuse(problems, f"{path}: {len(problems)} lines do not fit the header", "quote values that hold commas")
    yield from rows


def _parquet(path: Path) -> Iterator[Row]:
    # pyarrow comes with `datasets`, so training machines have it and the parent loads it only here.
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path.name}: reading Parquet needs pyarrow",
            hint="pip install 'forge-ship[train]', or convert the file to JSONL",
        ) from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    yield from (Row(values, path.name, number) for number, values in enumerate(table.to_pylist(), start=1))
