"""Runs the Go templates that forge writes, so that `exact` means the written text itself was run.

Exactly the subset that `go_template` writes: string literals, `.Role`, `.Content`, variables, range
over `.Messages`, if / else if / else, and the functions eq, lt, len, slice, not. Anything else is a
`GoTemplateError`, never a guess. The semantics are those of Go's text/template; a test compares
both over many templates and conversations.

Not covered: every other part of the language.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from forge.chat.template import Message
from forge.errors import DataError

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_ACTION = re.compile(r"\{\{(- )?((?:" + _STRING + r"|(?!\}\}).)*?)( -)?\}\}", re.DOTALL)
_TOKEN = re.compile(rf"\s*({_STRING}|:=|=|[(),]|\$\.\w+|\$\w+|\.\w+|\w+)\s*")
_ESCAPE = re.compile(r'\\(["\\ntr]|u[0-9a-f]{4}|U[0-9a-f]{8})')
_PLAIN = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}


class GoTemplateError(DataError):
    """The text is not in the subset that forge writes, or fails when it runs."""


@dataclass
class _Scope:
    """Variables and the dot; `$` is always the root. Assignments reach the scope that declared."""

    dot: object
    variables: dict[str, object]
    outer: _Scope | None = None

    def home(self, name: str) -> dict[str, object]:
        if name in self.variables:
            return self.variables
        if self.outer is None:
            raise GoTemplateError(f"undefined variable {name}")
        return self.outer.home(name)


_Expression = Callable[[_Scope], object]
_Node = Callable[[_Scope, list[str]], None]


@dataclass(frozen=True)
class GoTemplate:
    """A parsed template; `render` gives the text for a conversation."""

    nodes: Sequence[_Node]

    def render(self, messages: Sequence[Message]) -> str:
        listed = tuple({"Role": one["role"], "Content": one["content"]} for one in messages)
        root = {"Messages": listed}
        written: list[str] = []
        _run(self.nodes, _Scope(root, {"$": root}), written)
        return "".join(written)


def parse(source: str) -> GoTemplate:
    """Parse Go template text; raises `GoTemplateError` outside the subset."""
    reader = _Reader(_pieces(source))
    nodes = reader.nodes(end=())
    return GoTemplate(nodes)


def _pieces(source: str) -> list[tuple[str, str]]:
    """(`text` or `action`, its text), with the trim markers carried out."""
    found: list[tuple[str, str]] = []
    position, trims = 0, False
    for match in _ACTION.finditer(source):
        text = source[position : match.start()]
        text = text.lstrip(" \t\r\n") if trims else text
        text = text.rstrip(" \t\r\n") if match[1] else text
        found += [("text", text), ("action", match[2].strip())]
        position, trims = match.end(), bool(match[3])
    rest = source[position:].lstrip(" \t\r\n") if trims else source[position:]
    if any("{{" in text for kind, text in [*found, ("text", rest)] if kind == "text"):
        raise GoTemplateError("an action is not closed")
    return [piece for piece in [*found, ("text", rest)] if piece != ("text", "")]


class _Reader:
    """Walks the pieces and builds nodes."""

    def __init__(self, pieces: Sequence[tuple[str, str]]) -> None:
        self.pieces = list(pieces)

    def nodes(self, end: Sequence[str]) -> list[_Node]:
        """Nodes up to an action that begins with a word of `end`, which is left in front."""
        found: list[_Node] = []
        while self.pieces:
            kind, text = self.pieces[0]
            if kind == "action" and text.split(" ")[0] in ("end", "else"):
                if text.split(" ")[0] not in end:
                    raise GoTemplateError(f"unexpected {text}")
                return found
            self.pieces.pop(0)
            found.append(_write(text) if kind == "text" else self._action(text))
        if end:
            raise GoTemplateError("a block is not ended")
        return found

    def _action(self, text: str) -> _Node:
        word, _, rest = text.partition(" ")
        if word == "range":
            return self._range(rest)
        if word == "if":
            return self._if(rest)
        if match := re.fullmatch(r"(\$\w+) (:?=) (.+)", text, re.DOTALL):
            return _assign(match[1], match[2] == ":=", _expression(match[3]))
        return _show(_expression(text))

    def _range(self, header: str) -> _Node:
        match = re.fullmatch(r"(?:(\$\w+), (\$\w+) := )?(\.Messages)", header)
        if not match:
            raise GoTemplateError(f"range over {header}")
        body = self.nodes(("end",))
        self.pieces.pop(0)
        return _loop(match[1], match[2], _expression(match[3]), body)

    def _if(self, condition: str) -> _Node:
        asked = _expression(condition)
        yes = self.nodes(("end", "else"))
        closing = self.pieces.pop(0)[1]
        if closing == "end":
            return _branch(asked, yes, [])
        if closing == "else":
            no = self.nodes(("end",))
            self.pieces.pop(0)
            return _branch(asked, yes, no)
        if not closing.startswith("else if "):
            raise GoTemplateError(f"unexpected {closing}")
        return _branch(asked, yes, [self._if(closing.removeprefix("else if "))])


def _run(nodes: Sequence[_Node], scope: _Scope, written: list[str]) -> None:
    for node in nodes:
        node(scope, written)


def _write(text: str) -> _Node:
    return lambda scope, written: written.append(text)


def _show(expression: _Expression) -> _Node:
    def run(scope: _Scope, written: list[str]) -> None:
        value = expression(scope)
        if not isinstance(value, str):
            raise GoTemplateError(f"only texts are written, not {type(value).__name__}")
        written.append(value)

    return run


def _assign(name: str, declares: bool, expression: _Expression) -> _Node:
    def run(scope: _Scope, written: list[str]) -> None:
        home = scope.variables if declares else scope.home(name)
        home[name] = expression(scope)

    return run


def _loop(index: str | None, item: str | None, over: _Expression, body: Sequence[_Node]) -> _Node:
    def run(scope: _Scope, written: list[str]) -> None:
        messages = over(scope)
        assert isinstance(messages, tuple)
        for number, message in enumerate(messages):
            variables = {index: number, item: message} if index and item else {}
            _run(body, _Scope(message, {**variables}, scope), written)

    return run


def _branch(asked: _Expression, yes: Sequence[_Node], no: Sequence[_Node]) -> _Node:
    def run(scope: _Scope, written: list[str]) -> None:
        # The zero values of Go's types are false, as in Python.
        _run(yes if asked(scope) else no, _Scope(scope.dot, {}, scope), written)

    return run


def _expression(text: str) -> _Expression:
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise GoTemplateError(f"cannot read {text[position:]!r}")
        tokens.append(match[1])
        position = match.end()
    return _call(iter(tokens), closing=False)


def _call(tokens: Iterator[str], closing: bool) -> _Expression:
    """A function with its arguments, or one value; up to the end or the closing parenthesis."""
    operands: list[_Expression] = []
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
    if not name or len(operands) != _FUNCTIONS[name][0]:
        raise GoTemplateError(f"{name or 'a value'} with {len(operands)} arguments")
    function = _FUNCTIONS[name][1]
    return lambda scope: function(*(operand(scope) for operand in operands))


def _operand(token: str) -> _Expression:
    if token.startswith('"'):
        text = _unquoted(token)
        return lambda scope: text
    if token.isdecimal() or token in ("true", "false"):
        value = json.loads(token)
        return lambda scope: value
    if re.fullmatch(r"\$\w+", token):
        return lambda scope: scope.home(token)[token]
    if token == "$.Messages":
        return lambda scope: _field(scope.home("$")["$"], "Messages")
    if token in (".Messages", ".Role", ".Content"):
        return lambda scope: _field(scope.dot, token[1:])
    raise GoTemplateError(f"{token} is not in the subset")


def _field(value: object, name: str) -> object:
    if not isinstance(value, Mapping) or name not in value:
        raise GoTemplateError(f"no field {name} here")
    return value[name]


def _unquoted(token: str) -> str:
    inner = token[1:-1]
    if "\\" in _ESCAPE.sub("", inner):
        raise GoTemplateError(f"an escape in {token} is not in the subset")
    return _ESCAPE.sub(
        lambda match: _PLAIN[match[1]] if match[1] in _PLAIN else chr(int(match[1][1:], 16)), inner
    )


def _equal(left: object, right: object) -> bool:
    if type(left) is not type(right) or not isinstance(left, str | int):
        raise GoTemplateError("eq compares two texts or two numbers")
    return left == right


def _less(left: object, right: object) -> bool:
    if type(left) is not int or type(right) is not int:
        raise GoTemplateError("lt compares two numbers")
    return left < right


def _length(value: object) -> int:
    if not isinstance(value, tuple):
        raise GoTemplateError("len is taken of messages alone")
    return len(value)


def _slice(value: object, start: object) -> object:
    if not isinstance(value, tuple) or type(start) is not int or start > len(value):
        raise GoTemplateError("slice takes messages and a place among them")
    return value[start:]


_FUNCTIONS: Mapping[str, tuple[int, Callable[..., object]]] = {
    "eq": (2, _equal),
    "lt": (2, _less),
    "len": (1, _length),
    "slice": (2, _slice),
    "not": (1, lambda value: not value),
}
