"""Columns inside of objects and lists, by their path: `translation.en`, `turns.0.text`.

Not covered: paths in a message's own keys, which are read by their names (`turns`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from forge.data.texts import parsed

_DEEPEST, _MOST_HINTS = 8, 4


def with_paths(values: Mapping[str, Any], paths: Collection[str]) -> Mapping[str, Any]:
    """The row with what stands at these paths as columns; what stands beside it keeps its own path.

    A column whose name is the whole path is that path.
    """
    if not paths:
        return values
    made: dict[str, Any] = {}
    for key, value in values.items():
        within = [path[len(key) + 1 :] for path in paths if path.startswith(f"{key}.") and path not in values]
        if within and (inside := _items(value)):
            made |= {f"{key}.{name}": item for name, item in with_paths(inside, within).items()}
        else:
            made[key] = value
    return made


def texts_inside(values: Mapping[str, Any]) -> list[str]:
    """Paths of a few texts inside of a row's columns: sentences first, and what is not deep."""
    texts = [(path, text) for key, value in values.items() for path, text in _texts(key, value, 0)]
    texts.sort(key=lambda each: (" " not in each[1].strip(), each[0].count(".")))
    return [path for path, _ in texts[:_MOST_HINTS]]


def _texts(path: str, value: object, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and depth and value.strip():
        yield path, value
    elif depth < _DEEPEST and not (isinstance(value, list) and len(value) > 1):  # of several none is meant
        for name, item in _items(value).items():
            yield from _texts(f"{path}.{name}", item, depth + 1)


def _items(value: object) -> Mapping[str, Any]:
    value = parsed(value)
    if isinstance(value, Mapping):
        return value
    return {str(at): item for at, item in enumerate(value)} if isinstance(value, list) else {}
