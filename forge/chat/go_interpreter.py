"""Runs Go templates of chats: those that forge writes, so that `exact` means the written text itself was run,
and what people write in Modelfiles by hand, so that it can be checked.

Literals, fields, variables, range, if, with, break, continue, comments, trim markers; the functions of
`go_expression`. Anything else is a `GoTemplateError`, never a guess. The semantics are those of Go's
text/template; a test compares both over many templates and conversations.

Not covered: define, template, block; pipelines; declarations inside `if` and `with`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.chat.go_expression import STRING, Expression, GoTemplateError, Scope, expression
from forge.chat.template import Message

_ACTION = re.compile(r"\{\{(-\s)?((?:/\*.*?\*/|" + STRING + r"|(?!\}\}).)*?)(\s-)?\}\}", re.DOTALL)
_KEYWORDS = ("define", "template", "block")

_Node = Callable[[Scope, "_Written"], None]


# A conversation of thousands of messages takes fewer.
MOST_STEPS = 1_000_000


class _BreakError(Exception):
    """`break`; `continue` is `_ContinueError`."""


class _ContinueError(Exception):
    pass


@dataclass(frozen=True)
class GoTemplate:
    """A parsed template; `render` gives the text for a conversation, `run` for any data."""

    nodes: Sequence[_Node]

    def render(self, messages: Sequence[Message]) -> str:
        listed = tuple({"Role": message["role"], "Content": message["content"]} for message in messages)
        return self.run({"Messages": listed})

    def run(self, root: Mapping[str, Any]) -> str:
        written = _Written()
        _run(self.nodes, Scope(root, {"$": root}), written)
        return "".join(written)


def parse_go(source: str, *, cut_after: str = "") -> GoTemplate:
    """Parse Go template text; raises `GoTemplateError` outside the language above.

    With `cut_after`, a field, all that stands behind the first action which writes it is left out.
    """
    pieces = _pieces(source)
    reader = _Reader(_cut(pieces, cut_after) if cut_after else pieces)
    try:
        return GoTemplate(reader.nodes(end=()))
    except RecursionError as deep:
        raise GoTemplateError("it is nested too deeply") from deep


def _cut(pieces: Sequence[tuple[str, str]], field: str) -> list[tuple[str, str]]:
    """Blocks that are open at the cut keep their `else` and `end`."""
    kept: list[tuple[str, str]] = []
    is_cut, depth = False, 0
    for kind, text in pieces:
        word = re.split(r"\s", text, maxsplit=1)[0] if kind == "action" else ""
        if not is_cut:
            kept.append((kind, text))
            opens = word in ("if", "else", "with", "range")
            is_cut = kind == "action" and not opens and bool(re.search(rf"{re.escape(field)}\b", text))
        elif word in ("if", "with", "range"):
            depth += 1
        elif word == "end" and depth:
            depth -= 1
        elif word in ("end", "else") and not depth:
            kept.append((kind, text))
    return kept


def _pieces(source: str) -> list[tuple[str, str]]:
    """(`text` or `action`, its text), with the trim markers carried out."""
    pieces: list[tuple[str, str]] = []
    position, trims = 0, False
    for match in _ACTION.finditer(source):
        text = source[position : match.start()]
        text = text.lstrip(" \t\r\n") if trims else text
        text = text.rstrip(" \t\r\n") if match[1] else text
        action = match[2].strip()
        pieces += [("text", text)] + ([] if action.startswith("/*") else [("action", action)])
        position, trims = match.end(), bool(match[3])
    rest = source[position:].lstrip(" \t\r\n") if trims else source[position:]
    if any("{{" in text for kind, text in [*pieces, ("text", rest)] if kind == "text"):
        raise GoTemplateError("an action is not closed")
    return [piece for piece in [*pieces, ("text", rest)] if piece != ("text", "")]


class _Reader:
    """Walks the pieces and builds nodes."""

    def __init__(self, pieces: Sequence[tuple[str, str]]) -> None:
        self.pieces = list(pieces)
        self.loops = 0

    def nodes(self, end: Sequence[str]) -> list[_Node]:
        """Nodes up to an action that begins with a word of `end`, which is left in front."""
        nodes: list[_Node] = []
        while self.pieces:
            kind, text = self.pieces[0]
            word = re.split(r"\s", text, maxsplit=1)[0]
            if kind == "action" and word in ("end", "else"):
                if word not in end:
                    raise GoTemplateError(f"unexpected {text}")
                return nodes
            self.pieces.pop(0)
            nodes.append(_write(text) if kind == "text" else self._action(word, text))
        if end:
            raise GoTemplateError("a block is not ended")
        return nodes

    def _action(self, word: str, text: str) -> _Node:
        rest = text.removeprefix(word).strip()
        if word == "range":
            return self._range(rest)
        if word in ("if", "with"):
            return self._branch(word, rest)
        if text in ("break", "continue") and self.loops:
            return _jump(_BreakError if text == "break" else _ContinueError)
        if word in _KEYWORDS:
            raise GoTemplateError(f"{word} is not in the part of the language that is run here")
        if match := re.fullmatch(r"(\$\w+)\s*(:?=)\s*(.+)", text, re.DOTALL):
            return _assign(match[1], match[2] == ":=", expression(match[3]))
        return _show(expression(text))

    def _range(self, header: str) -> _Node:
        match = re.fullmatch(r"(?:(\$\w+)\s*,\s*)?(?:(\$\w+)\s*:=\s*)?(.+)", header, re.DOTALL)
        if not match or (match[1] and not match[2]):
            raise GoTemplateError(f"range over {header}")
        self.loops += 1
        body = self.nodes(("end", "else"))
        self.loops -= 1
        return _loop(match[1], match[2], expression(match[3]), body, self._otherwise())

    def _branch(self, word: str, condition: str) -> _Node:
        if ":=" in re.sub(STRING, "", condition):
            raise GoTemplateError(
                f"a declaration in {word} is not in the part of the language that is run here"
            )
        asked = expression(condition)
        yes = self.nodes(("end", "else"))
        return _decide(asked, yes, self._otherwise(), moves=word == "with")

    def _otherwise(self) -> list[_Node]:
        """What stands after `else`, up to the end; the closing action is taken."""
        closing = self.pieces.pop(0)[1]
        if closing == "end":
            return []
        if closing == "else":
            nodes = self.nodes(("end",))
            self.pieces.pop(0)
            return nodes
        match = re.fullmatch(r"else\s+(if|with)\s+(.+)", closing, re.DOTALL)
        if not match:
            raise GoTemplateError(f"unexpected {closing}")
        return [self._branch(match[1], match[2])]


def _run(nodes: Sequence[_Node], scope: Scope, written: _Written) -> None:
    for node in nodes:
        node(scope, written)


class _Written(list[str]):
    """What was written so far, by at most so many steps: a TEMPLATE of others may hold loops in loops."""

    steps = 0

    def append(self, text: str) -> None:
        super().append(text)
        self.step()

    def step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise GoTemplateError(f"it takes more than {MOST_STEPS:,} steps")


def _write(text: str) -> _Node:
    return lambda scope, written: written.append(text)


def _jump(kind: type[Exception]) -> _Node:
    def run(scope: Scope, written: _Written) -> None:
        raise kind

    return run


def _show(shown: Expression) -> _Node:
    def run(scope: Scope, written: _Written) -> None:
        value = shown(scope)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise GoTemplateError(f"only texts are written, not {type(value).__name__}")
        written.append(str(value))

    return run


def _assign(name: str, declares: bool, value: Expression) -> _Node:
    def run(scope: Scope, written: _Written) -> None:
        home = scope.variables if declares else scope.home(name)
        home[name] = value(scope)

    return run


def _loop(
    index: str | None, item: str | None, over: Expression, body: Sequence[_Node], empty: Sequence[_Node]
) -> _Node:
    def run(scope: Scope, written: _Written) -> None:
        values = over(scope)
        if not isinstance(values, tuple):
            raise GoTemplateError("range takes only lists")
        for number, value in enumerate(values):
            written.step()
            bound = {index: number, item: value}
            variables: dict[str, object] = {name: bound_value for name, bound_value in bound.items() if name}
            try:
                _run(body, Scope(value, variables, scope), written)
            except _ContinueError:
                continue
            except _BreakError:
                break
        if not values:
            _run(empty, Scope(scope.dot, {}, scope), written)

    return run


def _decide(asked: Expression, yes: Sequence[_Node], no: Sequence[_Node], *, moves: bool) -> _Node:
    """`if`; `with` also moves the dot."""

    def run(scope: Scope, written: _Written) -> None:
        # The zero values of Go's types are false, as in Python.
        value = asked(scope)
        dot = value if value and moves else scope.dot
        _run(yes if value else no, Scope(dot, {}, scope), written)

    return run
