"""Jinja's sandbox for somebody else's template, with a bound on every single step that could eat the machine.

Jinja has loops, which `time_limit` stops between two steps of Python; a step of C it cannot stop. So a step
that makes a text, a list or a number is measured before it runs, and refused (`SecurityError`) when its
result could be larger than any chat needs: operators, `~`, the output of a block, filters, text methods.

Not covered: memory that many small steps take together (the time limit ends those).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.nodes import Concat
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Characters and elements. The longest rows that people train with are a few of these long.
MOST = 10_000_000
# A text or list repeated, and a width or count that is told.
MOST_REPEATED = 1_000_000
_MOST_BITS = 4096
_WIDTH = re.compile(r"\d{6,}|%[^a-zA-Z%]*\*")
_GROWING = {"center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "translate"}
# They may write an argument once for each character of the text.
_FOR_EACH = {"expandtabs", "indent", "replace", "tojson", "translate", "urlize", "wordwrap"}
# They make bytes, which nothing here measures.
_TO_BYTES = {"encode", "to_bytes"}


def refuse(what: str) -> None:
    raise jinja2.exceptions.SecurityError(what)


def refuse_larger(size: float, most: int = MOST) -> None:
    if size > most:
        refuse(f"a text of more than {most:,} characters")


def weight(*values: object) -> int:
    """About as many characters as `values` have as text; stops counting where it is too much."""
    total, seen, waiting = 0, 0, list(values)
    while waiting and total <= MOST:
        one, seen = waiting.pop(), seen + 1
        if seen > MOST_REPEATED:
            return MOST + 1
        total += len(one) if isinstance(one, str | bytes) else 1
        if isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            total += len(one)
            waiting += one
    return total


def joined(parts: Iterable[object]) -> str:
    """The texts of `parts` as one; measured first."""
    kept: list[str] = []
    total = 0
    for part in parts:
        total += len(part) if isinstance(part, str) else weight(part)
        refuse_larger(total)
        kept.append(part if isinstance(part, str) else str(part))
    return "".join(kept)


def _finalized(value: Any) -> Any:
    if not isinstance(value, str | int | float):
        refuse_larger(weight(value))
    return value


def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter or method `name`, whose arguments are looked at before it runs."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if name == "join":
            # A generator can be measured only when it is a list.
            args = tuple(list(one) if isinstance(one, Iterator) else one for one in args)
        _look_at(name, (*args, *kwargs.values()))
        return function(*args, **kwargs)

    return run


def _look_at(name: str, given: Sequence[object]) -> None:
    values = [one for one in given if isinstance(one, str | int | float | list | tuple | Mapping)]
    if any(isinstance(one, int | float) and abs(one) > MOST_REPEATED for one in values[1:]):
        refuse(f"a number of more than {MOST_REPEATED:,} for {name}")
    texts = [one for one in values if isinstance(one, str)]
    if name == "replace" and len(texts) == 3:
        found = texts[0].count(texts[1])
        refuse_larger(len(texts[0]) + found * len(texts[2]))
    elif name == "join":
        listed = [one for one in values if isinstance(one, list | tuple | Mapping | str)]
        refuse_larger(weight(*listed) + max(map(len, listed), default=0) * max(map(len, texts), default=0))
    elif name in ("format", "format_map"):
        _look_at_format(texts[0] if texts else "", values[1:])
    elif name in _FOR_EACH and values:
        most = max((one if isinstance(one, int | float) else weight(one) for one in values[1:]), default=1)
        refuse_larger(weight(values[0]) * max(most, 1))
    else:
        refuse_larger(weight(*values))


def _look_at_format(form: str, values: Sequence[object]) -> None:
    if _WIDTH.search(form):
        refuse("so wide a field in a format")
    fields = form.count("{") + form.count("%")
    widest = max(map(int, re.findall(r"\d+", form)), default=0)
    refuse_larger(len(form) + fields * (weight(*values) + widest))


class _Generator(CodeGenerator):
    """`a ~ b` goes through `joined`."""

    @optimizeconst
    def visit_Concat(self, node: Concat, frame: Frame) -> None:  # noqa: N802 - jinja2's name
        self.write("environment.concat((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with the bounds of this module."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _Generator
    concat = staticmethod(joined)

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_finalized, **options)
        self.filters = {name: measured(name, one) for name, one in self.filters.items()}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _TO_BYTES and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _look_at_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        name, owner = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        if isinstance(owner, str) and name in _GROWING:
            if name == "join":
                args = tuple(list(one) if isinstance(one, Iterator) else one for one in args)
            _look_at(name, (owner, *args, *kwargs.values()))
        return super().call(context, called, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = value.__self__

        def run(*args: Any, **kwargs: Any) -> str:
            _look_at("format", (form, *args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return run


def _look_at_operator(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * right}.get(operator, 0)
        if bits > _MOST_BITS:
            refuse("a number of more than a thousand digits")
        return
    made = (str, list, tuple)
    if operator == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(one, made) and isinstance(times, int):
                refuse_larger(weight(one) * times, MOST_REPEATED)
    elif operator == "+" and isinstance(left, made):
        refuse_larger(weight(left, right))
    elif operator == "%" and isinstance(left, str):
        values = right if isinstance(right, tuple) else (right,)
        _look_at("format", (left, *values))
