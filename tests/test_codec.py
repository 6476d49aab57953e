"""Typed values through JSON: whole, and refused where a key or a value is not what the class says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from forge.codec import from_plain, to_plain


@dataclass(frozen=True)
class Inner:
    size: float
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    path: Path
    kind: Literal["a", "b"]
    inner: Inner
    several: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (0, "")
    by_name: Mapping[str, int | None] = field(default_factory=dict)
    count: int | float = 0
    lines: Sequence[str] = ()
    is_done: bool = False
    other: Path | None = None
    free: Any = None


WHOLE = Outer(
    Path("/a/b"), "b", Inner(1.5), (Inner(2.0, "x"), Inner(3.0)), (4, "y"), {"one": 1, "none": None}, 7,
    ("l",), True, Path("c"), {"as": ["it", "is"]},
)  # fmt: skip


def test_a_value_comes_back_as_it_went() -> None:
    text = json.dumps(to_plain(WHOLE))
    back = from_plain(Outer, json.loads(text))
    assert back == WHOLE and type(back.count) is int and isinstance(back.path, Path)
    assert from_plain(Outer, {"path": "p", "kind": "a", "inner": {"size": 1}}).inner == Inner(1.0)


LEAST = {"path": "p", "kind": "a", "inner": {"size": 1.0}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pahts": 1}, "Outer has no pahts"),
        ({"inner": {"size": 1, "nmae": "x"}}, "Outer.inner has no nmae"),
        ({"inner": {}}, "Outer.inner lacks size"),
        ({"kind": "c"}, "Outer.kind: 'c' is none of 'a', 'b'"),
        ({"several": [{"size": 1}, {"size": "big"}]}, "Outer.several[1].size: str, expected float"),
        ({"pair": [1]}, "Outer.pair: 1 values, expected 2"),
        ({"by_name": {"x": "1"}}, "Outer.by_name.x: str, expected int"),
        ({"is_done": 1}, "Outer.is_done: int, expected bool"),
        ({"lines": "text"}, "Outer.lines: str, expected Sequence"),
        ({"path": None}, "Outer.path: NoneType, expected Path"),
        ({"count": True}, "Outer.count: bool, expected int; Outer.count: bool, expected float"),
    ],
)  # fmt: skip
def test_what_the_class_does_not_say_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_plain(Outer, {**LEAST, **change})
    assert str(caught.value) == message


def test_a_file_of_another_version_may_say_more() -> None:
    assert from_plain(Outer, {**LEAST, "new": 1}, is_strict=False).kind == "a"
