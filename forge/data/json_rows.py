"""Rows of a JSON text in any of its layouts: lines, one list, a list under a key, columns, one object."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forge import report
from forge.codec import JSON, RepeatedKeyError
from forge.data.conversation import Row, Rows, RowsOf
from forge.data.exports import plain_row
from forge.data.fields import MESSAGES, ROLE, ROW_FIELDS, TEXT, message_part, plain
from forge.data.problems import BadRows
from forge.data.texts import parsed
from forge.errors import DataError, Problem

_PIECE = 4_000_000  # characters of a list that are read at once
_BEFORE_FIRST, _BEFORE_NEXT = re.compile(r"\s*(\]?)"), re.compile(r"\s*([,\]])\s*")
_NO_OBJECT = "not an object in braces"
# How a line begins that is no JSON -> what it is.
_NO_JSON: Mapping[str, str] = {
    **dict.fromkeys(("#", "//", "/*"), "a comment, which JSON does not have"),
    "\0": "null characters: the file was not written to its end, or is damaged",
}
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


def is_json_line(text: str) -> bool:
    try:
        return isinstance(parsed(json.loads(text.lstrip().partition("\n")[0])), (dict, list))
    except (ValueError, RecursionError):
        return False


def is_json(text: str) -> bool:
    """Whether a text is one JSON list or object."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def are_json_lines(lines: Sequence[str]) -> bool:
    """Whether a text that begins with these lines, none empty, has an object a line."""
    objects = sum(line.lstrip().startswith("{") and is_json_line(line) for line in lines)
    return len(lines) > 1 and 2 * objects >= len(lines) and not lines[0].lstrip().startswith("[")


def json_rows(text: str, name: str, split: str, bad: BadRows) -> tuple[list[Row], str]:
    """JSON lines, one document, or documents that are longer than a line one after the other."""
    lines = [line for line in text.split("\n", 20)[:20] if line.strip()]
    if are_json_lines(lines):
        return json_lines(text, name, bad), "JSON lines"
    is_first_whole = bool(lines) and is_json_line(lines[0])
    documents: list[tuple[object, int]] = []
    at = len(text) - len(text.lstrip())
    while at < len(text):
        line = text.count("\n", 0, at) + 1
        try:
            document, at = JSON.raw_decode(text, at)
        except json.JSONDecodeError as error:
            if is_first_whole and len(lines) > 1:
                return json_lines(text, name, bad), "JSON lines"
            hint = "one {...} a line, or a list of them in [brackets]; no comment, no comma behind the last"
            if documents and text[at : at + 1] == ",":
                hint = "one {...} a line without commas between, or [brackets] around all"
            elif text.lstrip().startswith("{'"):
                hint = "single quotes are Python's, not JSON's: write each row with json.dumps"
            elif len(lines) > 1 and all(line.startswith("{") for line in lines):
                hint = "one {...} a line"
            raise DataError(
                f"data.source: {name}:{error.lineno}: not JSON: {error.msg}", hint=hint
            ) from error
        except RepeatedKeyError as error:
            hint = f"the object begins {error.begins}"
            raise DataError(f"data.source: {name}: {error}", hint=hint) from error
        except (ValueError, RecursionError) as error:
            hint = "write it again with a JSON library: numbers and nesting have limits"
            raise DataError(f"data.source: {name}:{line}: not JSON: {error}", hint=hint) from error
        documents.append((document, line))
        while at < len(text) and text[at].isspace():
            at += 1
    if len(documents) == 1 and _is_only_line(documents[0][0], lines, name):
        return json_lines(text, name, bad), "JSON lines"
    if len(documents) == 1:
        items, kind = _items(documents[0][0], name, split)
        return [Row(item, name, number) for number, item in enumerate(items, start=1)], kind
    rows = [(_row(document), line) for document, line in documents]
    problems = [Problem(_NO_OBJECT, "", name, line) for row, line in rows if row is None]
    bad.settle(
        problems, f"{name}: {len(problems)} documents are not JSON objects", "one {...} after the other"
    )
    return [Row(row, name, line) for row, line in rows if row is not None], "JSON objects"


def _is_only_line(whole: object, lines: Sequence[str], name: str) -> bool:
    """Whether the one object of a file is a row, by the file's name and by what is no list in it."""
    return (
        isinstance(whole, dict)
        and len(lines) == 1
        and (".jsonl" in name.lower() or ".ndjson" in name.lower())
        and (
            not all(isinstance(value, list) for value in whole.values())
            or {"input", "output"} == whole.keys()
        )
    )


def _row(value: object) -> Mapping[str, Any] | None:
    """The row that a JSON value is: an object, or a list of messages."""
    if isinstance(value, list) and value and _is_conversation(value):
        return {MESSAGES: value}
    return value if isinstance(value, dict) else None


def _items(whole: object, name: str, split: str) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The rows of one JSON document: a list, a list under a key, columns, or one row."""
    if isinstance(whole, list):
        if whole and all(isinstance(item, dict) for item in whole):
            return [_inner(item) for item in whole], "a JSON list"
        if all(isinstance(item, str) for item in whole):
            return [{TEXT: item} for item in whole], "a JSON list of texts"
        if all(isinstance(item, list) for item in whole):
            return [{MESSAGES: item} for item in whole], "a JSON list of conversations"
        number = next(at for at, item in enumerate(whole) if not isinstance(item, dict))
        raise DataError(
            f"data.source: {name}: item {number + 1} of the list is not an object",
            hint='expected [{"prompt": ...}, ...]',
        )
    if isinstance(whole, dict):
        lists = {key: value for key, value in whole.items() if isinstance(value, list)}
        of_rows = {
            key: value
            for key, value in lists.items()
            if value and all(isinstance(item, dict) for item in value)
        }
        wanted = split.partition("[")[0]
        if (
            whole
            and {key.lower() for key in whole} <= {*SPLITS}
            and not any(isinstance(value, str) for value in whole.values())
        ):
            if wanted not in whole:
                raise DataError(f"data.split: {name} has no {wanted!r}", hint=f"it has {', '.join(whole)}")
            items, kind = _items(whole[wanted], name, split)
            return items, f"{kind.replace('a JSON', 'the JSON')} of the split {wanted}"
        table = _columns(whole)
        if table is not None:
            return table, "JSON columns"
        are_rows = {key: {*ROW_FIELDS[MESSAGES]} & {*map(plain, of_rows[key][0])} for key in of_rows}
        if any(plain(key) in ROW_FIELDS[MESSAGES] and not are_rows[key] for key in of_rows):
            return [whole], "one JSON object"
        chosen = next((key for key, items in of_rows.items() if _inner(items[0]) is not items[0]), "")
        chosen = chosen or (next(iter(of_rows)) if len(of_rows) == 1 else wanted)
        if chosen in of_rows:
            return [_inner(item) for item in of_rows[chosen]], f"the JSON list under {chosen}"
        values = list(whole.values())
        if of_rows and len(of_rows) == len(whole) and all(map(_is_conversation, values)):
            return [{MESSAGES: value} for value in values], "JSON conversations by their keys"
        if len(of_rows) > 1:
            raise DataError(
                f"data.source: {name} has several lists of rows: {', '.join(of_rows)}",
                hint=f"data.split: {next(iter(of_rows))} takes that one",
            )
        if len(values) == 1 and isinstance(values[0], dict):
            return _items(values[0], name, split)
        if values and all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values):
            return values, "JSON objects by their keys"
        if lists and len(lists) == len(whole):
            lengths = ", ".join(f"{key} {len(value)}" for key, value in lists.items())
            raise DataError(
                f"data.source: {name}: its columns do not have the same length: {lengths}",
                hint="each column needs a value for each row",
            )
        is_row = any(isinstance(value, str) for value in whole.values()) or plain_row(whole) is not whole
        if not of_rows and is_row:
            return [whole], "one JSON object"
    raise DataError(f"data.source: {name}: not a list of objects", hint='expected [{"prompt": ...}, ...]')


def _is_conversation(value: Sequence[Any]) -> bool:
    return all(isinstance(item, dict) and any(message_part(key) == ROLE for key in item) for item in value)


def _inner(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row inside of what the hub's dataset viewer gives."""
    is_wrapped = item.keys() >= {"row_idx", "row"} and isinstance(item["row"], dict)
    return item["row"] if is_wrapped else item


def _columns(whole: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The rows of {column: [values]} (or {column: {index: value}}), and of {columns, data: [[...]]}."""
    values = list(whole.values())
    names, data = whole.get("columns"), whole.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(item, list) for item in data):
        return [dict(zip(names, item, strict=False)) for item in data]
    if values and all(isinstance(value, dict) and value for value in values):
        indices = list(values[0])
        if all(list(value) == indices for value in values) and all(index.isdigit() for index in indices):
            return [{key: value[index] for key, value in whole.items()} for index in indices]
    is_plain = all(isinstance(value, list) and value and not isinstance(value[0], dict) for value in values)
    if len(values) == 1 and is_plain:
        part = ROW_FIELDS[MESSAGES] if isinstance(values[0][0], list) else ROW_FIELDS[TEXT]
        is_plain = plain(next(iter(whole))) in part
    if values and is_plain and len({len(value) for value in values}) == 1:
        return [dict(zip(whole, items, strict=True)) for items in zip(*values, strict=True)]
    return None


def json_lines(text: str, name: str, bad: BadRows) -> list[Row]:
    return list(_settled(enumerate(text.split("\n"), start=1), name, bad))


def _settled(lines: Iterable[tuple[int, str]], name: str, bad: BadRows) -> Iterator[Row]:
    """The rows of the lines; raises one `DataError` at the end for those that have none."""
    problems: list[Problem] = []
    for number, line in lines:
        row = _of_line(line, name, number, JSON.decode)
        if isinstance(row, Row):
            yield row
        elif row:
            problems.append(row)
    bad.settle(problems, f"{name}: {len(problems)} lines are not JSON objects", "one {...} a line")


def _of_line(
    line: str, name: str, number: int, decode: Callable[[str], object] = json.loads
) -> Row | Problem | None:
    """The line's row, or why it has none; None for an empty one."""
    try:
        values = decode(line.removeprefix("\ufeff"))  # files put one after the other keep their marks
    except json.JSONDecodeError as error:
        what = next((what for mark, what in _NO_JSON.items() if line.lstrip().startswith(mark)), "")
        message = what or f"not JSON: {error.msg}"
        return Problem(message, "", name, number) if line.strip() else None
    except RepeatedKeyError as error:
        return Problem(str(error), "", name, number)
    except (ValueError, RecursionError) as error:
        return Problem(f"not JSON: {error}", "", name, number)
    row = _row(parsed(values))
    return Problem(_NO_OBJECT, "", name, number) if row is None else Row(row, name, number)


def rows_of_list(path: Path, name: str) -> tuple[Rows, str] | None:
    """The rows of a large file that is one JSON list in UTF-8, read anew each time they are gone through.

    None where it is no list of objects or of conversations.
    """
    try:
        items = report.track(f"read {name}", _items_of(path), path.stat().st_size, lambda item: item[1])
        kinds = Counter(type(item) if _row(item) is not None else None for item, _ in items)
    except (ValueError, RecursionError):  # reading it as a whole says what is wrong
        return None

    if len(kinds) != 1 or None in kinds:
        return None

    def rows() -> Iterator[Row]:
        for number, (item, _) in enumerate(_items_of(path), start=1):
            yield Row(_inner(_row(item) or {}), name, number)

    of = " of conversations" if list in kinds else ""
    return RowsOf(kinds.total(), rows), f"a JSON list{of}"


def _items_of(path: Path) -> Iterator[tuple[object, int]]:
    """The items of a JSON list, with the characters that each takes; raises `ValueError` where it is none."""
    with path.open(encoding="utf-8-sig") as stream:
        text, at, size, before = stream.read(_PIECE).lstrip(), 1, _PIECE, _BEFORE_FIRST
        if not text.startswith("["):
            raise ValueError("no list")
        while True:
            try:
                match = before.match(text, at)
                if match and match[1] == "]" and not (text[match.end() :] + stream.read()).strip():
                    return
                item, end = JSON.raw_decode(text, match.end() if match else len(text))
                if end == len(text):
                    raise ValueError("it may go on")
            except ValueError:
                if not (piece := stream.read(size)):
                    raise
                text, at, size = text[at:] + piece, 0, 2 * size
                continue
            yield item, end - at
            at, size, before = end, _PIECE, _BEFORE_NEXT


def rows_of_lines(path: Path, name: str, bad: BadRows) -> Rows:
    """The rows of a file of JSON lines in UTF-8, read anew each time they are gone through."""
    lines = report.track(f"read {name}", _lines(path, name), path.stat().st_size, lambda line: len(line[1]))
    count = sum(1 for _ in _settled(lines, name, bad))

    def rows() -> Iterator[Row]:
        for number, line in _lines(path, name):
            row = _of_line(line, name, number)
            if isinstance(row, Row):
                yield row

    return RowsOf(count, rows)


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    at = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            yield number, decoded(line, "utf-8-sig" if number == 1 else "utf-8", name, number, at)
            at += len(line)


def decoded(data: bytes, encoding: str, name: str, line: int = 1, at: int = 0) -> str:
    """The text of `data`, which begins in this line of the file, at this byte."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line += before.count(b"\n")
        cut = before.rpartition(b"\n")[2][-30:] + data[error.start : error.start + 10]
        raise DataError(
            f"data.source: {name}:{line} is not "
            f"{encoding.removesuffix('-sig').upper()}: {error.reason} at byte {at + error.start} ({cut!r})",
            hint="set data.encoding, for instance to cp1252 (Western Windows) or latin-1",
        ) from error
