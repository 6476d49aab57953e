"""The two files of a batch: prompts in, answers out, both one JSON object a line.

The output is the only record of what is done: rows are appended and flushed to the disk, a line
torn by a crash is dropped, and a second process on the same output is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import filelock

from forge.errors import DataError, Problem, StageError
from forge.serve.endpoint import ROLES, Message

Id = str | int
# How every row that we write begins; what does not is not ours to drop.
_BEGINNING = b'{"id": '


@dataclass(frozen=True)
class Row:
    """One prompt: a conversation, or `raw` text that no template is put around."""

    id: Id
    messages: tuple[Message, ...] = ()
    raw: str = ""


def read_rows(path: Path, *, raw: bool = False) -> list[Row]:
    """Read prompts: `{id, prompt}` or `{id, messages}`; other keys are left alone, blank lines skipped.

    `raw`: each prompt is all that the model is to see.

    Raises `DataError` with every line that is wrong, and every id that stands there twice.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    seen: dict[Id, int] = {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = _row(line, raw)
            if row.id in seen:
                raise ValueError(f"the id {row.id!r} stands on line {seen[row.id]} already")
        except ValueError as wrong:
            problems.append(Problem(str(wrong), file=str(path), line=number))
        else:
            seen[row.id] = number
            rows.append(row)
    if problems:
        raise DataError(
            f"{path}: {len(problems)} of its lines cannot be used; nothing was sent",
            hint='each line is {"id": ..., "prompt": "..."} or {"id": ..., "messages": [...]}',
            problems=problems,
        )
    if not rows:
        raise DataError(f"{path}: no prompts in it")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as stream:
            yield from enumerate(stream, start=1)
    except OSError as wrong:
        raise DataError(f"{path} cannot be read: {wrong.strerror}") from wrong


def _row(line: bytes, raw: bool) -> Row:
    fields = _object(line)
    # Half a surrogate pair is JSON but no text: it could be neither sent nor written.
    json.dumps(fields, ensure_ascii=False).encode()
    if "id" not in fields:
        raise ValueError("no id")
    if not _is_id(fields["id"]):
        raise ValueError(f"the id must be a text or a whole number, not {fields['id']!r}")
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError("give prompt or messages, one of the two")
    if raw and "prompt" not in fields:
        raise ValueError("messages cannot be sent raw; give a prompt")
    if "prompt" not in fields:
        return Row(fields["id"], _messages(fields["messages"]))
    if not isinstance(fields["prompt"], str):
        raise ValueError("prompt must be a text")
    if raw:
        return Row(fields["id"], raw=fields["prompt"])
    return Row(fields["id"], ({"role": "user", "content": fields["prompt"]},))


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list with at least one message")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError("every message needs a role and a content that is a text")
        if message.get("role") not in ROLES:
            # Many templates drop a role they do not know without a word.
            raise ValueError(f"unknown role {message.get('role')!r}; known are {', '.join(ROLES)}")
    return tuple(value)


def _object(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as wrong:
        raise ValueError(f"not JSON: {wrong}") from wrong
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    return fields


def _is_id(value: object) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


class Output:
    """The answers, locked while it is open. `done` says of each id in it whether it succeeded.

    Raises `StageError` when another process has it open, `DataError` when the file holds anything
    but answers. With `retry_failed` failed rows are taken out first.
    """

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        self.path = path
        self.done: dict[Id, bool] = {}
        self._retry_failed = retry_failed
        self._lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)

    def __enter__(self) -> Output:
        if not self.path.parent.is_dir():
            raise DataError(f"{self.path} cannot be written: there is no such directory")
        try:
            self._lock.acquire()
        except filelock.Timeout as taken:
            raise StageError(
                f"another process is writing {self.path}", hint="wait for it, or choose another file"
            ) from taken
        except OSError as wrong:
            raise DataError(f"{self.path} cannot be written: {wrong.strerror}") from wrong
        try:
            self._resume()
            self._stream: IO[bytes] = self.path.open("ab")
        except OSError as wrong:
            self._lock.release()
            raise DataError(f"{self.path} cannot be written: {wrong.strerror}") from wrong
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._lock.release()

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Write rows, each with its `id` first, and wait until they are on the disk."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._stream.write(text.encode("utf-8", errors="replace"))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _resume(self) -> None:
        """Read what is there, and rewrite it when something of it has to go."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        *lines, torn = content.split(b"\n")
        kept: list[bytes] = []
        problems: list[Problem] = []
        if torn and not (torn.startswith(_BEGINNING) or _BEGINNING.startswith(torn)):
            problems.append(Problem("not an answer", file=str(self.path), line=len(lines) + 1))
        for number, line in enumerate(lines, start=1):
            fields = _answer(line)
            if fields is None or fields["id"] in self.done:
                what = "not an answer" if fields is None else f"a second answer to {fields['id']!r}"
                problems.append(Problem(what, file=str(self.path), line=number))
            elif "text" in fields or not self._retry_failed:
                self.done[fields["id"]] = "text" in fields
                kept.append(line + b"\n")
        if problems:
            raise DataError(
                f"{self.path} holds something else than the answers of a batch; it was left as it is",
                hint="choose another output file",
                problems=problems,
            )
        if torn or len(kept) < len(lines):
            self._rewrite(b"".join(kept))

    def _rewrite(self, content: bytes) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.path)


def _answer(line: bytes) -> dict[str, Any] | None:
    try:
        fields = _object(line)
    except ValueError:
        return None
    return fields if _is_id(fields.get("id")) and ("text" in fields or "error" in fields) else None
