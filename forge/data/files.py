"""Rows of one file, recognized by its content: JSON in its layouts, tables, Parquet, Arrow, text; packed too.

The suffix only decides where the content says nothing. Large JSON lines, Parquet and Arrow are read anew each
time their rows are gone through; what else there is, and what is packed, is held in memory.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from forge.data.conversation import Row, Rows, RowsOf
from forge.data.json_rows import (
    are_json_lines,
    decoded,
    is_json,
    is_json_line,
    json_lines,
    json_rows,
    rows_of_lines,
)
from forge.data.problems import BadRows
from forge.errors import DataError, Problem

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
PACKED = (".gz", ".zst", ".bz2", ".xz")
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_EXCEL_DELIMITER = re.compile("sep=.(?=\r?\n)")
"""Excel's own first line, which is no header; its end stays, so that lines keep their numbers."""
_SNIFFED_RECORDS, _SNIFFED_LINES, _SNIFFED_BYTES = 50, 20, 4_000_000
_HELD_BYTES = 32_000_000
_BATCH = 1000
_FOREIGN: Mapping[bytes, str] = {
    b"PK\x03\x04": "a zip archive or an Excel sheet; unpack it, or save the sheet as CSV",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"%PDF": "a PDF; extract its text first",
    b"\x89HDF": "an HDF5 file; save the table as Parquet",
    b"\x80\x04\x95": "a pickle, which forge does not open; save the rows as JSONL",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; run git lfs pull",
    b"<!DOCTYPE": "a web page, not the file; download the file itself",
    b"<html": "a web page, not the file; download the file itself",
}


@dataclass(frozen=True)
class FileRows:
    """The rows of a file and what kind of file it was taken for."""

    rows: Rows
    kind: str


def is_data_file(name: str) -> bool:
    """Whether a file of this name can hold rows."""
    path = PurePath(name.lower())
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix in SUFFIXES


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """All rows of a file (the first `limit`), or one `DataError` that lists every unreadable line."""
    return list(islice(read_file(path).rows, limit))


def read_file(
    path: Path, *, encoding: str | None = None, split: str = "train", bad: BadRows | None = None
) -> FileRows:
    """The rows of a file; raises `DataError` with every line that cannot be read.

    `encoding` is that of a text file that is neither UTF-8 nor says what it is; `split` chooses among
    the lists of a JSON file that has one for each; `bad` says how many lines may be left out.
    """
    bad = bad or BadRows()
    try:
        if encoding is None and _has_json_lines(path):
            rows = rows_of_lines(path, bad)
            if rows:
                return FileRows(rows, "JSON lines")
        head, data = _unpacked(path)
        name, suffix = path.name, PurePath(path.name.lower())
        inner = (suffix.with_suffix("") if suffix.suffix in PACKED else suffix).suffix
        if head:
            rows, kind = _arrow_rows(path, data, name, head), head
        else:
            rows, kind = _text_rows(data, name, inner, encoding, split, bad)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"data.source: cannot read {path}: {why}") from error
    if not len(rows):
        raise DataError(f"data.source: {path} has no rows", hint="training needs at least a few hundred")
    return FileRows(rows, kind)


def _has_json_lines(path: Path) -> bool:
    """Whether a large file is plain text of an object a line."""
    if path.stat().st_size < _HELD_BYTES:
        return False
    with path.open("rb") as stream:
        first = [stream.readline(_SNIFFED_BYTES) for _ in range(_SNIFFED_LINES)]
    try:
        text = b"".join(first).decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return are_json_lines([line for line in text.split("\n") if line.strip()])


def _unpacked(path: Path) -> tuple[str, bytes]:
    """What kind of table the file is ("" for text), and its bytes without their packing."""
    with path.open("rb") as stream:
        start = stream.read(32)
    openers: Mapping[bytes, Callable[[Path], bytes]] = {
        b"\x1f\x8b": lambda packed: gzip.decompress(packed.read_bytes()),
        b"BZh": lambda packed: bz2.decompress(packed.read_bytes()),
        b"\xfd7zXZ\x00": lambda packed: lzma.decompress(packed.read_bytes()),
        b"\x28\xb5\x2f\xfd": _from_zstd,
    }
    opener = next((opener for mark, opener in openers.items() if start.startswith(mark)), None)
    if opener is not None:
        data = opener(path)
    elif start.startswith((b"PAR1", b"ARROW1")):
        data = b""  # pyarrow maps the file itself
    else:
        data = path.read_bytes()
    start = data[:32] or start
    for mark, what in _FOREIGN.items():
        if start.startswith(mark):
            raise DataError(
                f"data.source: {path.name} is {what.partition('; ')[0]}", hint=what.partition("; ")[2]
            )
    if data[257:262] == b"ustar":
        raise DataError(f"data.source: {path.name} is a tar archive", hint="unpack it and name the directory")
    if start.startswith(b"PAR1"):
        return "Parquet", data
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "Arrow", data
    return "", data


def _from_zstd(path: Path) -> bytes:
    pyarrow = _pyarrow(path)
    with pyarrow.input_stream(str(path), compression="zstd") as stream:
        return bytes(stream.read())


def _pyarrow(path: Path) -> Any:
    # It comes with `datasets`, so training machines have it and the parent loads it only here.
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path.name}: reading it needs pyarrow",
            hint="pip install 'forge-ship[train]', or convert the file to JSONL",
        ) from error
    return pyarrow


def _arrow_rows(path: Path, data: bytes, name: str, kind: str) -> Rows:
    pyarrow = _pyarrow(path)

    def batches() -> Iterator[Any]:
        source = pyarrow.BufferReader(data) if data else pyarrow.OSFile(str(path))
        if kind == "Parquet":
            yield from pyarrow.parquet.ParquetFile(source).iter_batches(_BATCH)
        elif data.startswith(b"\xff\xff\xff\xff"):
            yield from pyarrow.ipc.open_stream(source)
        else:
            file = pyarrow.ipc.open_file(source)
            yield from map(file.get_batch, range(file.num_record_batches))

    def rows() -> Iterator[Row]:
        number = 0
        for batch in batches():
            for start in range(0, len(batch), _BATCH):
                for values in batch.slice(start, _BATCH).to_pylist():
                    number += 1
                    yield Row({key: _without_nulls(value) for key, value in values.items()}, name, number)

    try:
        return RowsOf(sum(map(len, batches())), rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"data.source: {path} is not a whole {kind} file: {error}", hint="copy or download it again"
        ) from error


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that a table filled with null because another row has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text_rows(
    data: bytes, name: str, suffix: str, encoding: str | None, split: str, bad: BadRows
) -> tuple[list[Row], str]:
    text, spelled = _decoded(data, name, encoding)
    start = text.lstrip()[:1]
    if not start:
        return [], "empty"
    says_json = suffix in (".json", ".jsonl", ".ndjson")
    if start in "{[" and (suffix not in (".txt", ".md") or is_json_line(text) or is_json(text)):
        rows, kind = json_rows(text, name, split, bad)
    elif says_json and _delimiter(text)[1] > 1 and not is_json_line(text):
        rows, kind = _table_rows(text, name, bad)
    elif says_json:
        rows, kind = json_lines(text, name, bad), "JSON lines"
    elif suffix in (".txt", ".md"):
        rows, kind = [Row({"text": text}, name, 1)], "one text"
    elif suffix in (".csv", ".tsv") or (suffix not in (".parquet", ".arrow") and _delimiter(text)[1] > 1):
        rows, kind = _table_rows(text, name, bad)
    else:
        wrong = (
            f"not {suffix[1:].capitalize()}, as its name says"
            if suffix in SUFFIXES
            else "an unknown kind of file"
        )
        raise DataError(f"data.source: {name} is {wrong}", hint="it can be one of " + ", ".join(SUFFIXES))
    return rows, kind + (f" in {spelled}" if spelled else "")


def _decoded(data: bytes, name: str, encoding: str | None) -> tuple[str, str]:
    """The text, and the encoding where it is worth showing."""
    marks = {
        b"\xff\xfe\x00\x00": "utf-32",
        b"\x00\x00\xfe\xff": "utf-32",
        b"\xff\xfe": "utf-16",
        b"\xfe\xff": "utf-16",
    }
    marked = next((kind for mark, kind in marks.items() if data.startswith(mark)), "")
    if not marked and data[:400].count(0) >= len(data[:400]) // 3 > 0:
        marked = "utf-16-be" if data[:1] == b"\x00" else "utf-16-le"
    used = encoding or marked or "utf-8-sig"
    try:
        return decoded(data, used, name).lstrip("\ufeff"), "" if used == "utf-8-sig" else used
    except LookupError as error:
        raise DataError(
            f"data.encoding: there is no encoding {used!r}", hint="for instance cp1252"
        ) from error


def _delimiter(text: str) -> tuple[str, int]:
    """What separates the values, and how many there are in the header."""
    best, most = ",", 0
    for delimiter in _DELIMITERS:
        widths = []
        try:
            for record in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
                widths += [len(record)] if record else []
                if len(widths) == _SNIFFED_RECORDS:
                    break
        except csv.Error:
            pass
        even = sum(width == widths[0] for width in widths) if widths and widths[0] > 1 else 0
        if even > most:
            best, most = delimiter, even
    header = next(csv.reader(io.StringIO(text, newline=""), delimiter=best), [])
    return best, len(header)


def _table_rows(text: str, name: str, bad: BadRows) -> tuple[list[Row], str]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        if match := _EXCEL_DELIMITER.match(text):
            text = text[match.end() :]
        delimiter, _ = _delimiter(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows, problems = _records(reader, name)
    finally:
        csv.field_size_limit(before)
    bad.settle(
        problems,
        f"{name}: {len(problems)} lines do not fit the header",
        "quote values that hold the delimiter",
    )
    return rows, f"a table with {_DELIMITERS[delimiter]}"


def _records(reader: Any, name: str) -> tuple[list[Row], list[Problem]]:
    problems: list[Problem] = []
    rows: list[Row] = []
    header: list[str] = []
    line = 1
    try:
        for record in reader:
            start, line = line, reader.line_num + 1
            if not record:
                continue
            if not header:
                header = [column.strip() for column in record]
                if repeated := next((column for column in header if header.count(column) > 1), None):
                    raise DataError(
                        f"data.source: {name}: two columns are called {repeated!r}",
                        hint="rename one of them in its first line",
                    )
            elif len(record) != len(header):
                many = "more" if len(record) > len(header) else "fewer"
                problems.append(Problem(f"{many} values than columns", "", name, start))
            else:
                rows.append(Row(dict(zip(header, record, strict=True)), name, start))
    except csv.Error as error:
        raise DataError(
            f"data.source: {name}:{line}: not CSV: {error}", hint="a quote inside a value is written twice"
        ) from error
    return rows, problems


def slice_of(count: int, split: str) -> range:
    """Which of `count` rows a slice such as `train[:10%]` or `train[100:200]` keeps; raises `DataError`."""
    _, bracket, inside = split.partition("[")
    if not bracket:
        return range(count)
    start, colon, stop = inside.removesuffix("]").partition(":")
    if not colon or not inside.endswith("]"):
        raise DataError(
            f"data.split: {split!r} is not a slice", hint="for instance train[:10%] or train[100:200]"
        )

    def place(text: str, default: int) -> int:
        number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
        if not number:
            return default
        try:
            at = float(number) if percent else int(number)
        except ValueError as error:
            raise DataError(
                f"data.split: {split!r} is not a slice", hint="for instance train[:10%]"
            ) from error
        at = round(count * at / 100) if percent else int(at)
        return at + count if at < 0 else at

    return range(count)[place(start, 0) : place(stop, count)]
