"""Names that other tools and older releases use, and what they are called here: `old_names.toml`, read."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".toml")
DROP = object()
"""Stands for "this value says what is the case anyway": the key is left out with a warning."""


class _Whatever(dict[Any, Any]):
    """Values of which each says what is the case anyway."""

    def __missing__(self, value: Any) -> object:
        return DROP


@dataclass(frozen=True)
class Old:
    """What became of a name: its new dotted name, or none and why."""

    new: str = ""
    why: str = ""
    values: Mapping[Any, Any] | None = None


def _values(entry: Mapping[str, Any]) -> Mapping[Any, Any]:
    """What is written to what it means here: a word stands for itself."""
    if entry.get("unchanged") == "any":
        return _Whatever()
    pairs = [(word, word) if isinstance(word, str) else word for word in entry.get("values", ())]
    return {**dict(pairs), **dict.fromkeys(entry.get("unchanged", ()), DROP)}


def _read(table: Mapping[str, Any]) -> Iterator[tuple[str, Old]]:
    for field, names in table["renamed"].items():
        yield from ((name, Old(field)) for name in names.split())
    for entry in table["valued"]:
        old = Old(entry.get("field", ""), entry.get("why", ""), _values(entry))
        yield from ((name, old) for name in entry["names"].split())
    for entry in table["answered"]:
        yield from ((name, Old(why=entry["why"])) for name in entry["names"].split())


_TABLE = tomllib.loads(TABLE.read_text(encoding="utf-8"))
OLD_NAMES: Mapping[str, Old] = dict(_read(_TABLE))
OUT_OF_SCOPE: Mapping[str, str] = {
    name: entry["why"]
    for entry in _TABLE["answered"]
    if entry.get("as_value")
    for name in entry["names"].split()
}
"""What recipes name as a value, too, and forge does not do: a sentence for each."""
