"""Expressions of Go templates: operands, the functions that templates for chat use, their exact meaning.

`go_interpreter` runs the blocks around them. A value is a text, a whole number, a truth, None (nothing
there), a tuple of values, or a mapping of fields. What is not known raises `GoTemplateError`.

Not covered: pipelines, printf, json, calls of methods.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from forge.errors import DataError

STRING = r'"(?:[^"\\\n]|\\.)*"|`[^`]*`'
_TOKEN = re.compile(rf"\s*({STRING}|:=|=|[(),]|\$?(?:\.\w+)+|\$\w*(?:\.\w+)*|\.|-?\w+)\s*")
_ESCAPE = re.compile(r'\\(["\\ntr]|u[0-9a-f]{4}|U[0-9a-f]{8})')
_PLAIN = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


class GoTemplateError(DataError):
    """The text is not in the part of the language that is run here, or fails when it runs."""


@dataclass
class Scope:
    """Variables and the dot; `$` is always the root. Assignments reach the scope that declared."""

    dot: object
    variables: dict[str, object]
    outer: Scope | None = None

    def home(self, name: str) -> dict[str, object]:
        if name in self.variables:
            return self.variables
        if self.outer is None:
            raise GoTemplateError(f"undefined variable {name}")
        return self.outer.home(name)


Expression = Callable[[Scope], object]


def expression(text: str) -> Expression:
    """Read one expression; raises `GoTemplateError` for what is not in the language above."""
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise GoTemplateError(f"cannot read {text[position:]!r}")
        tokens.append(match[1])
        position = match.end()
    return _call(iter(tokens), closing=False)


def _call(tokens: Iterator[str], closing: bool) -> Expression:
    """A function with its arguments, or one value; up to the end or the closing parenthesis."""
    operands: list[Expression] = []
    name = ""
    closed = False
    for token in tokens:
        if token == ")":
            closed = True
            break
        if token == "(":
            operands.append(_call(tokens, closing=True))
        elif token in _FUNCTIONS and not operands and not name:
            name = token
        else:
            operands.append(_operand(token))
    if closed != closing:
        raise GoTemplateError("parentheses do not match")
    if not name and len(operands) == 1:
        return operands[0]
    if not name or len(operands) not in _FUNCTIONS[name][0]:
        raise GoTemplateError(f"{name or 'a value'} with {len(operands)} arguments")
    function = _FUNCTIONS[name][1]
    # `and` and `or` stop at the argument that decides, so all are given unread.
    if name in ("and", "or"):
        return lambda scope: function(scope, operands)
    return lambda scope: function(*(operand(scope) for operand in operands))


def _operand(token: str) -> Expression:
    if token[0] in '"`':
        text = _unquoted(token) if token[0] == '"' else token[1:-1]
        return lambda scope: text
    if re.fullmatch(r"-?\d+|true|false", token):
        value = json.loads(token)
        return lambda scope: value
    if token == ".":
        return lambda scope: scope.dot
    if match := re.fullmatch(r"(\$\w*)?((?:\.\w+)*)", token):
        name, fields = match[1], match[2].split(".")[1:]
        if name is None:
            return lambda scope: _fields(scope.dot, fields)
        return lambda scope: _fields(scope.home(name)[name], fields)
    raise GoTemplateError(f"{token} is not in the part of the language that is run here")


def _fields(value: object, names: Sequence[str]) -> object:
    for name in names:
        if not isinstance(value, Mapping) or name not in value:
            raise GoTemplateError(f"no field {name} here")
        value = value[name]
    return value


def _unquoted(token: str) -> str:
    inner = token[1:-1]
    if "\\" in _ESCAPE.sub("", inner):
        raise GoTemplateError(f"an escape in {token} is not in the part of the language that is run here")
    return _ESCAPE.sub(
        lambda match: _PLAIN[match[1]] if match[1] in _PLAIN else chr(int(match[1][1:], 16)), inner
    )


def _equal(first: object, *others: object) -> bool:
    """`eq a b c` asks whether a is b or c."""
    if not others:
        raise GoTemplateError("eq with 1 arguments")
    for other in others:
        if type(first) is not type(other) or not isinstance(first, str | int):
            raise GoTemplateError("eq compares two texts or two numbers")
    return first in others


def _ordered(compare: Callable[[int, int], bool]) -> Callable[..., bool]:
    def run(left: object, right: object) -> bool:
        if type(left) is not int or type(right) is not int:
            raise GoTemplateError("only numbers are ordered")
        return compare(left, right)

    return run


def _length(value: object) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if not isinstance(value, tuple):
        raise GoTemplateError("len takes only texts and lists")
    return len(value)


def _slice(value: object, start: object, end: object = None) -> object:
    stop = len(value) if isinstance(value, tuple) and end is None else end
    if not isinstance(value, tuple) or type(start) is not int or type(stop) is not int:
        raise GoTemplateError("slice takes a list and places in it")
    if not 0 <= start <= stop <= len(value):
        raise GoTemplateError("slice: a place outside the list")
    return value[start:stop]


def _index(value: object, place: object) -> object:
    if not isinstance(value, tuple) or type(place) is not int or not 0 <= place < len(value):
        raise GoTemplateError("index takes a list and a place in it")
    return value[place]


def _decides(wanted: bool) -> Callable[[Scope, Sequence[Expression]], object]:
    def run(scope: Scope, operands: Sequence[Expression]) -> object:
        value: object = None
        for operand in operands:
            value = operand(scope)
            if bool(value) is wanted:
                break
        return value

    return run


_MANY = range(1, 100)
_FUNCTIONS: Mapping[str, tuple[Sequence[int], Callable[..., object]]] = {
    "eq": (_MANY, _equal),
    "ne": ((2,), lambda left, right: not _equal(left, right)),
    "lt": ((2,), _ordered(lambda left, right: left < right)),
    "le": ((2,), _ordered(lambda left, right: left <= right)),
    "gt": ((2,), _ordered(lambda left, right: left > right)),
    "ge": ((2,), _ordered(lambda left, right: left >= right)),
    "len": ((1,), _length),
    "slice": ((2, 3), _slice),
    "index": ((2,), _index),
    # The zero values of Go's types are false, as in Python.
    "not": ((1,), lambda value: not value),
    "and": (_MANY, _decides(False)),
    "or": (_MANY, _decides(True)),
}
