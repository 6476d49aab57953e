"""YAML 1.2 as a tree of values that know where they were written.

Everything that is wrong with the text itself is found here: bad YAML, duplicate keys, keys that are
not text, tags, aliases that hold themselves. Not covered: merge keys (`<<`), which YAML 1.2 dropped
and which are reported as unknown keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode

from forge.errors import Problem

_CORE = "tag:yaml.org,2002:"
_DEEPEST = 40
# A recipe with a hundred smoke queries has a thousand values.
_MOST = 50_000
_UNCLOSED = {"<stream end>", "found unexpected end of stream"}


def one_line(text: str) -> str:
    """The text with everything that moves a cursor written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Position:
    """A line of a file, or an override (`file` is then `-o key` and there is no line)."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def is_override(self) -> bool:
        return not self.line

    def problem(self, field: str, message: str) -> Problem:
        """A problem here."""
        return Problem(one_line(message), one_line(field), one_line(self.file), self.line)


@dataclass
class Node:
    """A value and its place: a scalar, a mapping or a list. `empty`: nothing was written at all."""

    value: Any
    place: Position
    empty: bool = False

    def plain(self) -> Any:
        """The value as Python's own types; lists become tuples."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return tuple(node.plain() for node in self.value)
        return self.value

    def child(self, part: str | int) -> Node | None:
        if isinstance(self.value, dict):
            return self.value.get(part)
        if isinstance(self.value, list) and isinstance(part, int) and part < len(self.value):
            node: Node = self.value[part]
            return node
        return None

    def follow(self, path: tuple[str | int, ...]) -> tuple[Node, int]:
        """The deepest node on `path` and how many parts of it were found."""
        node = self
        for count, part in enumerate(path):
            below = node.child(part)
            if below is None:
                return node, count
            node = below
        return node, len(path)


class _TooManyError(Exception):
    """More values than a recipe has."""

    message = f"holds more than {_MOST:,} values: an alias (*name) repeats too much"

    def __init__(self, line: int) -> None:
        super().__init__(self.message)
        self.line = line


class Reader:
    """Reads one text; collects what is wrong in `problems`."""

    def __init__(self, file: str, *, override: bool = False) -> None:
        self.file = file
        self.override = override
        self.problems: list[Problem] = []
        self._yaml = YAML(typ="safe", pure=True)
        self._open: list[YamlNode] = []
        self._count = 0

    def read(self, text: str) -> Node | None:
        """The tree of `text`; None when it is empty or cannot be read (then `problems` says why)."""
        try:
            root = self._yaml.compose(text)
        except MarkedYAMLError as wrong:
            at_end = _UNCLOSED & set(str(wrong.problem).split("'")) and wrong.context_mark
            mark = at_end or wrong.problem_mark or wrong.context_mark
            self._say(mark.line + 1 if mark else 1, "", f"is not valid YAML: {_syntax(wrong)}")
        except YAMLError as wrong:
            position = getattr(wrong, "position", 0)
            line = text.count("\n", 0, position) + 1
            self._say(line, "", "holds a control character, which YAML does not allow")
        except RecursionError:
            self._say(1, "", "is nested too deeply")
        else:
            try:
                return self._node(root, ()) if root is not None else None
            except _TooManyError as many:
                self.problems = [self._place(many.line).problem("", many.message)]
        return None

    def _place(self, line: int) -> Position:
        return Position(self.file, 0 if self.override else line)

    def _say(self, line: int, field: str, message: str) -> None:
        self.problems.append(self._place(line).problem(field, message))

    def _node(self, node: YamlNode, path: tuple[str, ...], line: int | None = None) -> Node:
        line = line or node.start_mark.line + 1
        place = self._place(line)
        self._count += 1
        if self._count > _MOST:
            # Aliases of aliases: 400 bytes of them are as many values as there are stars.
            raise _TooManyError(line)
        if any(node is above for above in self._open) or len(path) > _DEEPEST:
            self._say(line, ".".join(path[:3]), "is nested too deeply")
            return Node(None, place)
        self._open.append(node)
        try:
            if isinstance(node, MappingNode) and node.tag == _CORE + "map":
                return Node(self._mapping(node, path), place)
            if isinstance(node, SequenceNode) and node.tag == _CORE + "seq":
                items = [self._node(item, (*path, str(index))) for index, item in enumerate(node.value)]
                return Node(items, place)
            if isinstance(node, ScalarNode):
                return Node(self._scalar(node, path, line), place, node.value == "" and node.style is None)
            self._say(line, ".".join(path), f"the tag {node.tag} is not used in recipes; leave it out")
            return Node(None, place)
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode, path: tuple[str, ...]) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = self._text(key.value, path, line) if isinstance(key, ScalarNode) else "a list or a mapping"
            if not isinstance(key, ScalarNode) or key.tag != _CORE + "str":
                self._say(line, ".".join(path), f"keys must be text (got {name}); put it in quotes")
            elif name in children:
                first = children[name].place
                where = f" (the first is on line {first.line})" if first.line else ""
                self._say(line, ".".join((*path, name)), f"is written twice{where}; keep one")
            else:
                children[name] = self._node(value, (*path, name), line)
        return children

    def _text(self, text: str, path: tuple[str, ...], line: int) -> str:
        """The text with two escaped halves joined, as JSON writes a character beyond 16 bits."""
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._say(line, ".".join(path), "holds half of a character")
            return text.encode("utf-8", "replace").decode()

    def _scalar(self, node: ScalarNode, path: tuple[str, ...], line: int) -> Any:
        kind = str(node.tag).removeprefix(_CORE)
        if kind in ("str", "timestamp"):
            return self._text(node.value, path, line)
        if kind == "null":
            return None
        if kind == "bool":
            return node.value.lower() == "true"
        if kind in ("int", "float"):
            try:
                return self._yaml.constructor.construct_object(node)
            except ValueError:
                self._say(line, ".".join(path), "is not a number that can be read")
                return None
        self._say(line, ".".join(path), f"the tag {node.tag} is not used in recipes; leave it out")
        return None


def _syntax(wrong: MarkedYAMLError) -> str:
    problem = str(wrong.problem or wrong.context)
    if "'\\t'" in problem:
        return "a tab; YAML indents with spaces"
    if _UNCLOSED & set(problem.split("'")):
        return "a bracket or a quote that is not closed"
    if "<block end>" in problem:
        return "a line that does not fit those above: its indentation, or a missing ':' or quote"
    if "<document start>" in problem:
        return "something that does not belong to the fields above it"
    if "expected a single document" in str(wrong.context):
        return "a second document ('---'); a recipe is one"
    if "mapping values are not allowed" in problem:
        return "a ': ' where none may stand (put the text in quotes), or wrong indentation above"
    return problem
