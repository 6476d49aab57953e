"""The answers of a batch, one JSON object a line, and the only record of what is done.

Rows are appended and flushed to the disk, a line torn by a crash is dropped, and a second process on the same
file, by whatever name, is refused.

Not covered: an output that is no file (a pipe, a terminal) is written as the answers come, and a run that
is started again asks everything again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from forge.errors import DataError, Problem, StageError
from forge.files import try_lock
from forge.serve.ids import MOST_PROBLEMS, Id, Ids, is_id, is_stream, parse_object

# How every row that we write begins; what does not is not ours to drop.
_BEGINNING = b'{"id": '


class OutputError(StageError):
    """The output cannot be written: its disk is full, or nobody reads the pipe any more."""


class OutputLine(Protocol):
    """What the output is given: a row, the id that it answers, and whether it succeeded."""

    @property
    def id(self) -> Id: ...
    @property
    def succeeded(self) -> bool: ...
    @property
    def row(self) -> Mapping[str, object]: ...


class AnswerFile:
    """The answers: the file itself is locked while it is open, by whatever name it was opened.

    `ids` learns of each id in it whether it succeeded; `failed` counts those that did not. Raises
    `StageError` when another process has it open, `DataError` when it holds anything but answers. With
    `retry_failed` failed rows are taken out first. `-`, a pipe or a device is written and never read.
    """

    def __init__(self, path: Path, ids: Ids | None = None, *, retry_failed: bool = False) -> None:
        self.path = path
        self.ids = ids or Ids()
        self.failed = 0
        self.broken = False
        self._size = 0
        self._retry_failed = retry_failed
        self.is_stream = str(path) == "-" or is_stream(path)

    def __enter__(self) -> AnswerFile:
        if str(self.path) != "-" and not self.path.parent.is_dir():
            raise DataError(f"{self.path} cannot be written: there is no such directory")
        try:
            self._stream = self._opened()
            if not self.is_stream:
                try:
                    self._resume()
                except BaseException:
                    self._stream.close()
                    raise
        except OSError as wrong:
            raise DataError(f"{self.path} cannot be written: {wrong.strerror}") from wrong
        return self

    def __exit__(self, *_: object) -> None:
        # What could not be written was said by then.
        with contextlib.suppress(OSError):
            self._stream.close()

    def append(self, answers: Sequence[OutputLine]) -> None:
        """Write answers, and wait until they are on the disk.

        Raises `OutputError` where that fails; the file is then as it was before.
        """
        text = "".join(json.dumps(answer.row, ensure_ascii=False) + "\n" for answer in answers)
        content = text.encode("utf-8", errors="replace")
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[self._stream.write(rest) or 0 :]
            if not self.is_stream:
                os.fsync(self._stream.fileno())
        except OSError as wrong:
            self.broken = True
            if self.is_stream:
                raise OutputError(
                    f"{self.path} cannot be written any more: {wrong.strerror}",
                    hint="an output that is a file keeps what was answered, and goes on from there",
                ) from wrong
            with contextlib.suppress(OSError):
                self._stream.truncate(self._size)
            raise OutputError(
                f"{self.path} cannot be written: {wrong.strerror}",
                hint="make room there, then run the same command again: it goes on where it stopped",
            ) from wrong
        self._size += len(content)
        for answer in answers:
            self.ids.answer(answer.id, answer.succeeded)
            self.failed += not answer.succeeded

    def _opened(self) -> IO[bytes]:
        if str(self.path) == "-":
            return os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
        if self.is_stream:
            return self.path.open("wb", buffering=0)
        while True:
            stream = self.path.open("ab+", buffering=0)
            if not try_lock(stream):
                stream.close()
                raise StageError(
                    f"another process is writing {self.path}", hint="wait for it, or choose another file"
                )
            # Whoever held it may have put another file in its place before it was locked here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream.fileno()), self.path.stat()):
                    return stream
            stream.close()

    def _resume(self) -> None:
        """Read what is there, drop a torn line, and rewrite it when failed rows have to go."""
        problems: list[Problem] = []
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    if not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                        problems.append(Problem("not an answer", file=str(self.path), line=number))
                elif problem := self._problem_of(line):
                    problems.append(Problem(problem, file=str(self.path), line=number))
                else:
                    self._size += len(line)
                if len(problems) == MOST_PROBLEMS:
                    break
        if problems:
            raise DataError(
                f"{self.path} holds something else than the answers of a batch; it was left as it is",
                hint="choose another output file",
                problems=problems,
            )
        if self._retry_failed and self.failed:
            self._without_failed()
        elif self._size < os.fstat(self._stream.fileno()).st_size:
            self._stream.truncate(self._size)

    def _problem_of(self, line: bytes) -> str:
        answer = _answer(line)
        if answer is None:
            return "not an answer"
        row_id, succeeded = answer
        if self.ids.of(row_id)[1] is not None:
            return f"a second answer to {row_id!r}"
        self.ids.answer(row_id, succeeded)
        self.failed += not succeeded
        return ""

    def _without_failed(self) -> None:
        """Put a file without the failed rows in the place of this one, locked before it is there."""
        place = self.path.resolve()  # a link stays a link
        partial = place.with_name(f".{place.name}.partial")
        with contextlib.ExitStack() as stack:
            new = stack.enter_context(partial.open("wb+"))
            with self.path.open("rb") as lines:
                for line in lines:
                    answer = _answer(line) if line.endswith(b"\n") else None
                    if answer is not None and answer[1]:
                        new.write(line)
                    elif answer is not None:
                        self.ids.forget(answer[0])
            new.flush()
            os.fsync(new.fileno())
            shutil.copymode(place, partial)
            try_lock(new)
            partial.replace(place)
            before, self._stream = self._stream, os.fdopen(os.dup(new.fileno()), "ab", buffering=0)
            self._size, self.failed = new.tell(), 0
            before.close()


def _answer(line: bytes) -> tuple[Id, bool] | None:
    """The id of an answer, and whether it succeeded; None for what is none."""
    try:
        fields = parse_object(line)
    except ValueError:
        return None
    if isinstance(fields.get("custom_id"), str) and {"response", "error"} <= fields.keys():
        return fields["custom_id"], not fields["error"]
    if not is_id(fields.get("id")) or not ("text" in fields or "error" in fields):
        return None
    return fields["id"], "text" in fields
