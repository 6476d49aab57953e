"""Rows that were encoded, kept on disk as lines of JSON, with the few figures of each that decide its fate.

So that a million of them need little memory. The figures: which rows are the same, how long each line is in
tokens, how many of them carry loss. Not covered: reading a line back is the caller's (`json`).
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge.data.conversation import Conversation, Place
from forge.data.tokens import Encoded

_BUFFER = 1 << 20
_encoder = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True)
class Line:
    """A row that was encoded: its JSON, and what is known of it without reading that."""

    data: bytes
    tokens: int
    supervised: int
    is_text: bool
    notes: Sequence[str]
    place: Place


class Spool:
    """Conversations in order, each with the lines that it became. In `directory`, without a name."""

    def __init__(self, directory: Path) -> None:
        self._stream = tempfile.TemporaryFile(buffering=_BUFFER, dir=directory)  # noqa: SIM115 - closed by `close`
        self.marks: list[bytes] = []
        """The fingerprint of each conversation."""
        self.weights = array("d")
        self.judgements: list[frozenset[bool]] = []
        """Of each conversation: what its answers are held to be, good (True) and bad."""
        self._lines, self._numbers, self._files = array("I"), array("Q"), array("I")
        self._names: dict[str, int] = {}
        self._sizes, self._tokens, self._supervised = array("Q"), array("Q"), array("Q")
        self._kinds = array("I")
        self._known: dict[tuple[bool, tuple[str, ...]], int] = {}

    def add(self, conversation: Conversation, rows: Sequence[Encoded]) -> None:
        place = conversation.place
        self.marks.append(bytes.fromhex(conversation.fingerprint))
        self.weights.append(conversation.weight)
        self.judgements.append(_judgements(conversation))
        self._lines.append(len(rows))
        self._numbers.append(place.line)
        self._files.append(self._names.setdefault(place.file, len(self._names)))
        for row in rows:
            self._sizes.append(self._stream.write(line_of(row)))
            self._tokens.append(row.tokens)
            self._supervised.append(row.supervised)
            kind = (not row.conversation.turns, row.notes)
            self._kinds.append(self._known.setdefault(kind, len(self._known)))

    def close(self) -> None:
        self._stream.close()

    def place(self, number: int) -> Place:
        return Place(list(self._names)[self._files[number]], self._numbers[number])

    def lengths(self) -> Iterator[Sequence[int]]:
        """How many tokens each line of each conversation has."""
        at = 0
        for count in self._lines:
            yield self._tokens[at : at + count]
            at += count

    def __iter__(self) -> Iterator[list[Line]]:
        """The lines of each conversation, in order."""
        self._stream.seek(0)
        kinds = list(self._known)
        at = 0
        for number, count in enumerate(self._lines):
            place = self.place(number)
            yield [
                Line(
                    self._stream.read(self._sizes[line]),
                    self._tokens[line],
                    self._supervised[line],
                    *kinds[self._kinds[line]],
                    place,
                )
                for line in range(at, at + count)
            ]
            at += count


_BOTH, _NONE = frozenset({True, False}), frozenset[bool]()


def _judgements(conversation: Conversation) -> frozenset[bool]:
    if conversation.rejected:
        return _BOTH
    return _NONE if conversation.desirable is None else frozenset({conversation.desirable})


def line_of(row: Encoded) -> bytes:
    """The row as a line of either file (`prepare.PreparedRow`)."""
    conversation = row.conversation
    line = f'{{"input_ids": {_numbers(row.input_ids)}, "labels": {_numbers(row.labels)}, "messages": '
    line += _encoder.encode(conversation.messages())
    if conversation.tools:
        line += f', "tools": {_encoder.encode(list(conversation.tools))}'
    if any(turn.trained is False for turn in conversation.turns):
        answers = sum(turn.role == "assistant" and turn.trained is not False for turn in conversation.turns)
        line += f', "answers": {answers}'
    if conversation.desirable is not None:
        line += f', "desirable": {_encoder.encode(conversation.desirable)}'
    if row.rejected:
        pair = row.rejected
        line += f', "rejected_ids": {_numbers(pair.input_ids)}, "rejected_labels": {_numbers(pair.labels)}'
    return (line + "}\n").encode()


def _numbers(numbers: Sequence[int]) -> str:
    """Whole numbers as JSON: Python writes a list of them so too, and faster than its encoder."""
    return str(list(numbers))
