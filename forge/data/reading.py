"""From sources to conversations: each source with its own format, all with one account of what was read."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

from forge import report
from forge.data.conversation import Conversation, Row, RowsOf
from forge.data.conversations import Reading, understand
from forge.data.fields import plain, role_of
from forge.data.files import read_file, slice_of
from forge.data.layout import Reader, Shape, in_short
from forge.data.problems import BadRows
from forge.data.sources import in_few_words
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
    """What a source gives: how it was understood, and its conversations, made as they are gone through."""

    reading: Reading
    source: Source
    kinds: Sequence[str]

    def __iter__(self) -> Iterator[Conversation]:
        weight = self.source.weight
        return (row if row.weight == weight else replace(row, weight=weight) for row in self.reading)

    @functools.cached_property
    def conversations(self) -> tuple[Conversation, ...]:
        return tuple(report.track("read rows", self, len(self.reading.rows)))

    @property
    def line(self) -> str:
        """What was read, in a line."""
        kinds, rows = ", ".join(self.kinds), len(self.reading.rows)
        files, reading = in_few_words(self.source.files), self.reading
        return f"{files} ({kinds}): {rows:,} rows, {reading.format} ({reading.why})"


def read(source: Source, *, limit: int | None = None, bad: BadRows | None = None) -> Read:
    """What a source gives. Raises `DataError` for what cannot be read here, and, where the conversations are
    gone through, with every row that cannot be used.
    """
    bad = bad or BadRows()
    files = [read_file(path, encoding=source.encoding, split=source.split, bad=bad) for path in source.files]
    places = slice_of(sum(len(file.rows) for file in files), source.split)[:limit]
    if not places:
        raise DataError(f"data.split: {source.split} of {in_few_words(source.files)} has no rows")

    def rows() -> Iterator[Row]:
        return islice(chain.from_iterable(file.rows for file in files), places.start, places.stop)

    reading = understand(RowsOf(len(places), rows), source.shape, bad)
    return Read(reading, source, list(dict.fromkeys(file.kind for file in files)))


def refuse_absent(reads: Sequence[Read]) -> None:
    """Raise `DataError` for a column of `data.ignore` that no source has."""
    there = {plain(column): column for part in reads for column in part.reading.layout.columns}
    for name in dict.fromkeys(name for part in reads for name in part.source.shape.ignore):
        if plain(name) not in there:
            near = get_close_matches(plain(name), there, 1)
            meant = f"; did you mean {there[near[0]]}?" if near else ""
            raise DataError(
                f"data.ignore: no row has a column {name!r}{meant}",
                hint=f"the columns are: {in_short(list(there.values()))}",
            )


def refuse_unheard(reads: Sequence[Read]) -> None:
    """Raise `DataError` for a name of `data.roles` under which nobody speaks; all rows were gone through."""
    heard = {plain(name): name for part in reads for name in part.reading.notes.roles}
    for name in dict.fromkeys(name for part in reads for name in part.source.shape.roles):
        if plain(name) not in heard and role_of(name, {}) is None:
            near = get_close_matches(plain(name), heard, 1)
            meant = f"; did you mean {heard[near[0]]}?" if near else ""
            raise DataError(
                f"data.roles: nobody speaks under the name {name!r}{meant}",
                hint=f"names other than user and assistant are: {', '.join(heard.values()) or 'none'}",
            )


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
