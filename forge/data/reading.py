"""From sources to conversations: each source with its own format, all with one account of what was read."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forge.data.conversation import Conversation, Row
from forge.data.conversations import Reading, to_conversations
from forge.data.files import read_file, slice_of
from forge.data.layout import Reader, Shape
from forge.data.problems import BadRows
from forge.data.sources import shown
from forge.errors import DataError


@dataclass(frozen=True)
class Source:
    """Some files of one shape. `weight` is how often each of their rows is seen in an epoch.

    `commit` is that of a hub data set.
    """

    files: tuple[Path, ...]
    shape: Shape = field(default_factory=Shape)
    split: str = "train"
    weight: float = 1.0
    encoding: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Read:
    """What a source gave: its conversations, and how it was understood in a line."""

    reading: Reading
    line: str

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        return self.reading.conversations


def read(source: Source, *, limit: int | None = None, bad: BadRows | None = None) -> Read:
    """The conversations of a source; raises `DataError` with every row that cannot be used."""
    bad = bad or BadRows()
    rows: list[Row] = []
    kinds: dict[str, None] = {}
    for path in source.files:
        content = read_file(path, encoding=source.encoding, split=source.split, bad=bad)
        rows += content.rows
        kinds[content.kind] = None
    rows = list(slice_of(rows, source.split))[:limit]
    if not rows:
        raise DataError(f"data.split: {source.split} of {shown(source.files)} has no rows")
    reading = to_conversations(rows, source.shape, bad)
    conversations = tuple(replace(one, weight=source.weight) for one in reading.conversations)
    line = f"{shown(source.files)} ({', '.join(kinds)}): {len(rows):,} rows, {reading.format} ({reading.why})"
    return Read(replace(reading, conversations=conversations), line)


def reader_named(name: str, directory: Path) -> Reader:
    """The function that `module:function` names; modules beside the recipe count. Raises `DataError`."""
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, str(directory))
    try:
        function: object = getattr(importlib.import_module(module_name), function_name, None)
    except (ImportError, SyntaxError) as error:
        raise DataError(
            f"data.format: {module_name} cannot be imported: {error}",
            hint=f"put {module_name.partition('.')[0]}.py beside the recipe",
        ) from error
    finally:
        sys.path.remove(str(directory))
    if not callable(function):
        raise DataError(f"data.format: {module_name} has no function {function_name!r}")

    @functools.wraps(function)
    def call(values: Mapping[str, Any]) -> object:
        try:
            return function(dict(values))
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
            raise DataError(
                f"data.format: {name} fails on a row: {type(error).__name__}: {error}",
                hint=f"the row has {', '.join(map(str, values))}",
            ) from error

    return call


def merged(reads: Sequence[Read]) -> list[Conversation]:
    """The conversations of all sources, in order."""
    return [one for read_ in reads for one in read_.conversations]
