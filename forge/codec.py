"""JSON: frozen dataclasses to plain values and back, and objects in which no key stands twice.

The former are at the worker's pipe, the store and a run's manifest.

Fields may be str, int, float, bool, None, `Path`, `Literal`, other dataclasses, sections of a recipe
(pydantic models), unions of these, tuples, `Sequence`, `Mapping[str, ...]` and `Any` or `object` (JSON as it
is). A field such as `from_`, whose name is Python's own, is the key `from`. A key that the class does not
have is refused, and so is one that is missing and has no default: a misspelt key is never a value that was
left out.

Not covered: classes that JSON cannot tell apart; of a union the first that fits is taken.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


class RepeatedKeyError(ValueError):
    """A JSON object that has two values for one key; `begins` is how it begins."""

    def __init__(self, key: str, begins: str) -> None:
        super().__init__(f"{json.dumps(key)} stands twice in one object; keep the value that is meant")
        self.begins = begins


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(repeated, json.dumps(values)[:80])
    return values


JSON = json.JSONDecoder(object_pairs_hook=_object)
"""Reads what people wrote; `json.loads` keeps the last of two values without a word."""


def to_plain(value: object) -> Any:
    """`value` as JSON can hold it: dataclasses become dictionaries, paths text, tuples lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name.rstrip("_"): to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], value: object, *, is_strict: bool = True) -> T:
    """A `kind` from what `to_plain` made of one; raises `ValueError` that names the field.

    Without `is_strict` keys that the class does not have are left out: for files of another version.
    """
    made: T = _read(kind, value, kind.__name__, is_strict)
    return made


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any, where: str, is_strict: bool) -> Any:
    origin = get_origin(kind)
    if kind is Any or kind is object:
        return value
    if is_dataclass(kind):
        return _read_fields(kind, value, where, is_strict)
    if hasattr(kind, "model_validate_json"):
        # Of JSON text: a strict model takes a list for a tuple there only. Its own errors are ValueErrors.
        return value if isinstance(value, kind) else kind.model_validate_json(json.dumps(value))
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), value, where, is_strict)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where}: {value!r} is none of {', '.join(map(repr, get_args(kind)))}")
        return value
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        of_value = get_args(kind)[1]
        return {key: _read(of_value, item, f"{where}.{key}", is_strict) for key, item in value.items()}
    if origin is not None and issubclass(origin, Sequence) and isinstance(value, list | tuple):
        return _read_items(origin, get_args(kind), value, where, is_strict)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    # A bool is an int to Python, and no number to anybody else.
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or type(value) is not bool):
        return value
    raise ValueError(f"{where}: {type(value).__name__}, expected {getattr(kind, '__name__', kind)}")


def _read_fields(kind: Any, value: Any, where: str, is_strict: bool) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {type(value).__name__}, expected {kind.__name__}")
    known = {field.name.rstrip("_"): field for field in fields(kind) if field.init}
    if is_strict and (unknown := sorted(value.keys() - known.keys())):
        raise ValueError(f"{where} has no {', '.join(unknown)}")
    missing = [
        name
        for name, field in known.items()
        if name not in value and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    hints = _hints(kind)
    return kind(
        **{
            field.name: _read(hints[field.name], value[key], f"{where}.{key}", is_strict)
            for key, field in known.items()
            if key in value
        }
    )


def _read_union(kinds: Sequence[Any], value: Any, where: str, is_strict: bool) -> Any:
    if value is None and type(None) in kinds:
        return None
    reasons = []
    # An int is read as an int where the union has both.
    for kind in sorted(kinds, key=lambda kind: kind is not type(value)):
        try:
            return _read(kind, value, where, is_strict)
        except ValueError as reason:
            reasons.append(str(reason))
    raise ValueError("; ".join(reason for reason in reasons if "NoneType" not in reason) or where)


def _read_items(origin: Any, kinds: Sequence[Any], value: Sequence[Any], where: str, is_strict: bool) -> Any:
    if origin is tuple and (len(kinds) != 2 or kinds[1] is not Ellipsis):
        if len(kinds) != len(value):
            raise ValueError(f"{where}: {len(value)} values, expected {len(kinds)}")
        each = list(kinds)
    else:
        each = [kinds[0]] * len(value)
    read = [
        _read(kind, item, f"{where}[{number}]", is_strict)
        for number, (kind, item) in enumerate(zip(each, value, strict=True))
    ]
    return read if origin is list else tuple(read)
