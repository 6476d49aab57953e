"""Rows of a table of text: what separates its values, and a record for each row.

A small one is held as it comes; a large one is read anew each time its rows are gone through. Not covered:
Parquet and Arrow (`files`).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from forge import report
from forge.data.conversation import Row, Rows, RowsOf
from forge.data.problems import BadRows
from forge.errors import DataError, Problem

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_EXCEL_DELIMITER = re.compile("sep=.(?=\r?\n)")
"""Excel's own first line, which is no header; its end stays, so that lines keep their numbers."""
_SNIFFED_RECORDS = 50
_LONGEST_VALUE = 2**31 - 1


def delimiter_of(text: str) -> tuple[str, int]:
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


def table_rows(text: str, name: str, bad: BadRows) -> tuple[list[Row], str]:
    """The rows of a table, and what kind of table it is."""
    rows, kind = _table(lambda: [text], text, name)
    return list(_settled(rows(), name, bad)), kind


def rows_of_table(path: Path, head: str, name: str, bad: BadRows) -> tuple[Rows, str]:
    """The rows of a large table in UTF-8 that begins with `head`, read anew each time."""

    def lines() -> Iterator[str]:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from stream

    def shown() -> Iterator[str]:
        return report.track(f"read {name}", lines(), path.stat().st_size, len)

    first, kind = _table(shown, head, name)
    count = sum(1 for _ in _settled(first(), name, bad))
    again, _ = _table(lines, head, name)
    return RowsOf(count, lambda: (row for row in again() if isinstance(row, Row))), kind


def _table(
    pieces: Callable[[], Iterable[str]], head: str, name: str
) -> tuple[Callable[[], Iterator[Row | Problem]], str]:
    """What makes the records of a table whose text, in pieces, begins with `head`; and its kind."""
    excel = _EXCEL_DELIMITER.match(head)
    begins = excel.end() if excel else 0
    delimiter, _ = delimiter_of(head[begins:])

    def records() -> Iterator[Row | Problem]:
        csv.field_size_limit(_LONGEST_VALUE)
        stream = _lines(pieces(), begins)
        return _records(stream, delimiter, name)

    return records, f"a table with {_DELIMITERS[delimiter]}"


def _lines(pieces: Iterable[str], begins: int) -> Iterator[str]:
    for piece in pieces:
        yield from io.StringIO(piece[begins:], newline="")
        begins = 0


def _settled(records: Iterable[Row | Problem], name: str, bad: BadRows) -> Iterator[Row]:
    """The rows; raises one `DataError` at the end for the lines that are none."""
    problems: list[Problem] = []
    for record in records:
        if isinstance(record, Row):
            yield record
        else:
            problems.append(record)
    bad.settle(
        problems,
        f"{name}: {len(problems)} lines do not fit the header",
        "quote values that hold the delimiter, and keep one line of names",
    )


def _records(lines: Iterable[str], delimiter: str, name: str) -> Iterator[Row | Problem]:
    head, lines = [], iter(lines)
    for text in lines:
        head.append(text)
        if text.strip():
            break
    # A space behind every delimiter is no part of a value, and a quote may follow it.
    is_spaced = 0 < head[-1].count(delimiter) == head[-1].count(f"{delimiter} ") if head else False
    reader = csv.reader(chain(head, lines), delimiter=delimiter, strict=True, skipinitialspace=is_spaced)
    header: list[str] = []
    names: list[str] = []
    line = 1
    try:
        for record in reader:
            start, line = line, reader.line_num + 1
            if not record:
                continue
            if not header:
                names = record
                # Excel writes columns without a name where cells were once filled.
                header = [column.strip() or f"column {at}" for at, column in enumerate(record, start=1)]
                if repeated := next((column for column in header if header.count(column) > 1), None):
                    raise DataError(
                        f"data.source: {name}: two columns are called {repeated!r}",
                        hint="rename one of them in its first line",
                    )
            elif record == names:
                yield Problem("names of columns again: tables were put one after the other", "", name, start)
            elif len(record) != len(header):
                many = "more" if len(record) > len(header) else "fewer"
                yield Problem(f"{many} values than columns", "", name, start)
            else:
                yield Row(dict(zip(header, record, strict=True)), name, start)
    except csv.Error as error:
        raise DataError(
            f"data.source: {name}:{line}: not CSV: {error}", hint="a quote inside a value is written twice"
        ) from error
