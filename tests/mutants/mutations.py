"""Small faults that can be put into a source: where each is, and the text that makes it.

Not mutated: what a person reads (f-strings, hints, calls of `report`), types, decorators, asserts, a stage's
version, and arguments that change nothing on our platforms (`encoding`, zip's `strict`).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
}  # fmt: skip
_SAID = frozenset({"hint", "encoding", "strict"})


@dataclass(frozen=True)
class Mutation:
    """`before`, at byte `start` of the file, becomes `after`.

    It is the same mutation when the lines above it have changed.
    """

    path: str
    line: int = field(compare=False)
    kind: str
    start: int = field(compare=False)
    before: str
    after: str
    context: str  # the line, wherever in the file it stands
    number: int = 0  # among those of the file that are alike in all else

    @property
    def change(self) -> str:
        """Before and after, on one line."""
        return f"{' '.join(self.before.split())} → {' '.join(self.after.split()) or '(nothing)'}"

    def applied(self, source: bytes) -> bytes:
        """The whole file with the fault in it."""
        end = self.start + len(self.before.encode())
        assert source[self.start : end] == self.before.encode()
        return source[: self.start] + self.after.encode() + source[end:]


def mutations_of(path: str, source: str) -> list[Mutation]:
    """Every mutation of one file, in the order of its text."""
    text = _Text(path, source)
    made = [mutation for node in _mutable(ast.parse(source)) for mutation in _of(node, text)]
    places = {(one.start, one.kind, one.after, one.before): one for one in made}
    seen = Counter[Mutation]()
    numbered = []
    for _, mutation in sorted(places.items()):
        numbered.append(replace(mutation, number=seen[mutation]))
        seen[mutation] += 1
    return numbered


class _Text:
    """A source by its nodes: `ast` counts lines, and bytes within them."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.source, self._starts = path, source.encode(), [0]
        for line in self.source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset

    def mutation(self, kind: str, span: tuple[int, int], after: str) -> Mutation:
        start, end = span
        line = self.source.count(b"\n", 0, start) + 1
        context = self.source.splitlines()[line - 1].decode().strip()
        return Mutation(self.path, line, kind, start, self.source[start:end].decode(), after, context)


def _mutable(node: ast.AST) -> Iterator[ast.AST]:
    if _is_left_alone(node):
        return
    yield node
    for part in _parts(node):
        yield from _mutable(part)


def _is_left_alone(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Assert():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Assign(targets=[ast.Name(id="version")]):
            return True
        case ast.keyword(arg=name):
            return name in _SAID
        case ast.Expr(value=value):
            return _is_left_alone(value)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="report"))):
            return True
    return False


def _parts(node: ast.AST) -> Iterable[ast.AST]:
    """What is in it, but for its types and decorators."""
    match node:
        case ast.AnnAssign(value=value):
            return [value] if value else []
        case ast.FunctionDef(args=args, body=body):
            return [*args.defaults, *filter(None, args.kw_defaults), *body]
        case ast.ClassDef(body=body):
            return body
    return ast.iter_child_nodes(node)


def _of(node: ast.AST, text: _Text) -> Iterator[Mutation]:
    """The mutations of this node, those of its parts aside."""
    match node:
        case ast.Expr(value=ast.Call()):
            yield text.mutation("call deleted", text.span(node), "pass")
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield _negated(test, text)
        case ast.comprehension(ifs=tests):
            yield from (_negated(test, text) for test in tests)
        case ast.Compare(left=left, ops=operators, comparators=others):
            for operator, one, other in zip(operators, [left, *others], others, strict=False):
                old, new = _COMPARISONS[type(operator)]
                between = text.span(one)[1], text.span(other)[0]
                words = text.source[slice(*between)].decode()
                yield text.mutation("comparison swapped", between, words.replace(old, new, 1))
        case ast.Constant(value=bool() | int() | float() as number):
            after = str(not number) if isinstance(number, bool) else repr(2 * number or 1)
            yield text.mutation("constant changed", text.span(node), after)
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if key is not None:
                    yield _dropped("entry", (text.span(key)[0], text.span(value)[1]), text)
        case ast.Call(args=arguments, keywords=keywords):
            if len(arguments) > 1:
                yield _dropped("argument", text.span(arguments[-1]), text)
            for keyword in keywords:
                if keyword.arg and keyword.arg not in _SAID:
                    yield _dropped("argument", text.span(keyword), text)


def _negated(test: ast.expr, text: _Text) -> Mutation:
    span = text.span(test)
    return text.mutation("condition negated", span, f"(not ({text.source[slice(*span)].decode()}))")


def _dropped(what: str, span: tuple[int, int], text: _Text) -> Mutation:
    """With the comma that follows, if there is one."""
    start, end = span
    rest = text.source[end:]
    comma = len(rest) - len(rest.lstrip())
    end += comma + 1 if rest[comma : comma + 1] == b"," else 0
    return text.mutation(f"{what} dropped", (start, end), "")
