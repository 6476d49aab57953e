"""Rows of one file, recognized by its content: JSON in its layouts, tables, Parquet, Arrow, text; packed too.

The suffix only decides where the content says nothing. Large JSON lines, JSON lists and tables, Parquet and
Arrow are read anew each time their rows are gone through, large packed files from a copy that is not packed;
what is small, and JSON in other layouts, is held in memory.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from forge import report
from forge.data.conversation import Row, Rows, RowsOf
from forge.data.fields import COMPLETION, PROMPT, ROW_FIELDS, plain
from forge.data.json_rows import (
    are_json_lines,
    decoded,
    is_json,
    is_json_line,
    json_lines,
    json_rows,
    rows_of_lines,
    rows_of_list,
)
from forge.data.problems import BadRows
from forge.data.tables import delimiter_of, rows_of_table, table_rows
from forge.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
PACKED = (".gz", ".zst", ".bz2", ".xz")
_SNIFFED_LINES, _SNIFFED_BYTES = 20, 4_000_000
_HELD_BYTES = 32_000_000
_BATCH = 1000
_FOREIGN: Mapping[bytes, str] = {
    b"PK\x03\x04": "a zip archive or an Excel sheet; unpack it, or save the sheet as CSV",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"%PDF": "a PDF; extract its text first",
    b"\x89HDF": "an HDF5 file; save the table as Parquet",
    b"\xd0\xcf\x11\xe0": "an Excel sheet or a Word document; save the sheet as CSV",
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


# What lies beside rows and holds none.
_NOT_ROWS = {
    "dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json", "package.json",
    "config.json",
}  # fmt: skip


def is_data_file(name: str) -> bool:
    """Whether a file of this name can hold rows."""
    path = PurePath(name.lower())
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix in SUFFIXES


def lies_among_rows(path: Path, folder: Path) -> bool:
    """Whether a file that nobody named may hold rows of the set in `folder`."""
    is_hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return is_data_file(path.name) and path.name not in _NOT_ROWS and not is_hidden


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
        name, suffix = path.name, PurePath(path.name.lower())
        inner = (suffix.with_suffix("") if suffix.suffix in PACKED else suffix).suffix
        path = _plain(path)
        if encoding is None and (large := _large_rows(path, name, inner, bad)) is not None:
            return large
        head, data = _unpacked(path)
        if head:
            rows, kind = _arrow_rows(path, data, name, head), head
        else:
            if len(data) >= _HELD_BYTES:
                report.warning(
                    f"{name} ({len(data) / 1e6:,.0f} MB) is held whole in memory: JSON lines, a JSON list "
                    "and a table, in UTF-8, are read row by row"
                )
            rows, kind = _text_rows(data, name, inner, encoding, split, bad)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None) or error
        is_damaged = isinstance(error, (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile))
        raise DataError(
            f"data.source: cannot read {path}: {why}",
            hint="the packed file is damaged: copy or download it again" if is_damaged else "",
        ) from error
    if not len(rows):
        raise DataError(f"data.source: {path} has no rows", hint="training needs at least a few hundred")
    return FileRows(rows, kind)


def _large_rows(path: Path, name: str, suffix: str, bad: BadRows) -> FileRows | None:
    """The rows of a large file of text, read anew each time; None for what must be held as a whole."""
    if path.stat().st_size < _HELD_BYTES:
        return None
    with path.open("rb") as stream:
        first = [stream.readline(_SNIFFED_BYTES) for _ in range(_SNIFFED_LINES)]
    try:
        text = b"".join(first).decode("utf-8-sig")
        made = _read_anew(path, text, name, suffix, bad)
    except UnicodeDecodeError:  # reading it as a whole says where
        return None
    return FileRows(*made) if made and len(made[0]) else None


def _read_anew(path: Path, text: str, name: str, suffix: str, bad: BadRows) -> tuple[Rows, str] | None:
    """The rows of a file that begins with `text`, and its kind."""
    if are_json_lines([line for line in text.split("\n") if line.strip()]):
        return rows_of_lines(path, name, bad), "JSON lines"
    if text.lstrip().startswith("["):
        return rows_of_list(path, name)
    return rows_of_table(path, text, name, bad) if suffix in (".csv", ".tsv") else None


def _packing(path: Path) -> Callable[[Path], Any] | None:
    """What opens a packed file."""
    openers: Mapping[bytes, Callable[[Path], Any]] = {
        b"\x1f\x8b": gzip.open,
        b"BZh": bz2.open,
        b"\xfd7zXZ\x00": lzma.open,
        b"\x28\xb5\x2f\xfd": lambda packed: _pyarrow(packed).input_stream(str(packed), compression="zstd"),
    }
    with path.open("rb") as stream:
        start = stream.read(32)
    return next((opener for mark, opener in openers.items() if start.startswith(mark)), None)


_laid_out: dict[Path, tuple[tuple[int, int], Any]] = {}


def _plain(path: Path) -> Path:
    """A large packed file as one that is not, which is removed when the process ends; any other as it is."""
    opener = _packing(path)
    if opener is None:
        return path
    status = path.stat()
    stamp = (status.st_mtime_ns, status.st_size)
    if path not in _laid_out or _laid_out[path][0] != stamp:
        _laid_out.pop(path, None)
        with opener(path) as packed:
            start = packed.read(_HELD_BYTES)
            if len(start) < _HELD_BYTES:
                return path
            plain = tempfile.NamedTemporaryFile(prefix="forge-rows-")  # noqa: SIM115 - lives with the process
            plain.write(start)
            shutil.copyfileobj(packed, plain)
            plain.flush()
        _laid_out[path] = stamp, plain
    return Path(_laid_out[path][1].name)


def _unpacked(path: Path) -> tuple[str, bytes]:
    """What kind of table the file is ("" for text), and its bytes without their packing."""
    with path.open("rb") as stream:
        start = stream.read(32)
    opener = _packing(path)
    if opener is not None:
        with opener(path) as packed:
            data = bytes(packed.read())
    elif start.startswith((b"PAR1", b"ARROW1")):
        data = b""  # pyarrow maps the file itself
    else:
        data = path.read_bytes()
    start = data[:32] or start
    for mark, what in _FOREIGN.items():
        if start[: len(mark)].lower() == mark.lower():
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
        names = [column for batch in islice(batches(), 1) for column in batch.schema.names]
        if repeated := next((column for column in names if names.count(column) > 1), None):
            raise DataError(f"data.source: {name}: two columns are called {repeated!r}", hint="rename one")
        return RowsOf(sum(map(len, batches())), rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"data.source: {path} is not a whole {kind} file: {error}", hint="copy or download it again"
        ) from error


def _without_nulls(value: Any) -> Any:
    """`value` without the keys that a table filled with null because another row has them.

    Bytes that are UTF-8 are a text: what some programs write has no other.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
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
    elif says_json and delimiter_of(text)[1] > 1 and not is_json_line(text):
        rows, kind = table_rows(text, name, bad)
    elif says_json:
        rows, kind = json_lines(text, name, bad), "JSON lines"
    elif suffix == ".txt" and _has_known_columns(text):
        rows, kind = table_rows(text, name, bad)
    elif suffix in (".txt", ".md"):
        rows, kind = [Row({"text": text}, name, 1)], "one text"
    elif suffix in (".csv", ".tsv") or (suffix not in (".parquet", ".arrow") and delimiter_of(text)[1] > 1):
        rows, kind = table_rows(text, name, bad)
    else:
        wrong = (
            f"not {suffix[1:].capitalize()}, as its name says"
            if suffix in SUFFIXES
            else "an unknown kind of file"
        )
        raise DataError(f"data.source: {name} is {wrong}", hint="it can be one of " + ", ".join(SUFFIXES))
    return rows, kind + (f" in {spelled}" if spelled else "")


def _has_known_columns(text: str) -> bool:
    """Whether a text begins with the names of a question and its answer, as a table does."""
    delimiter, count = delimiter_of(text[:_SNIFFED_BYTES])
    names = [plain(name.strip(' "\r')) for name in text.partition("\n")[0].split(delimiter)]
    return count > 1 and all(any(name in ROW_FIELDS[part] for name in names) for part in (PROMPT, COMPLETION))


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
