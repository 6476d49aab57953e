"""The schema's refusals in plain words, each with the place where the value was written."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from forge.errors import Problem
from forge.recipe.fields import all_names, name_of, names_in, sections
from forge.recipe.old_names import OLD_NAMES, OUT_OF_SCOPE
from forge.recipe.schema import Adopted
from forge.recipe.tree import Node

_TAGS = ("training", "adopted", "none")

_WORDS: Mapping[str, str] = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "is too large a number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_unicode": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of fields",
    "model_attributes_type": "must be a mapping of fields",
    "none_required": "must be none",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must hold at least {min_length}",
}


def shown(value: Any) -> str:
    """A value as it would be written, kept short: text is quoted, so that `"8"` is not 8."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, float):
        return repr(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + '..."'


def nearest(word: str, known: Sequence[str]) -> str:
    """The word of `known` that was probably meant, or ""."""
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return close[0] if close else ""


def unknown_key(path: tuple[str, ...], names: Sequence[str]) -> str:
    """What to say of a key that its section, which has `names`, does not know."""
    key = path[-1]
    if ".".join(path) in all_names():
        return "is not used beside train.from: nothing is trained; leave it out"
    if old := OLD_NAMES.get(f"{path[0]}.{key}") or OLD_NAMES.get(key):  # in an item of a list
        here = old.new.rpartition(".")[2]
        meant_here = here if here in names else old.new
        return f"unknown key; did you mean {meant_here}?" if old.new else f"is not a field: {old.why}"
    elsewhere = [name for name in all_names() if name.rpartition(".")[2] == key and "*" not in name]
    meant = elsewhere[:2] or [nearest(key, names)]
    if meant[0]:
        return f"unknown key; did you mean {' or '.join(meant)}?"
    by_end = {name.rpartition(".")[2]: name for name in reversed(all_names()) if "*" not in name}
    far = difflib.get_close_matches(key.lower(), list(by_end), n=1, cutoff=0.8)
    if far:
        return f"unknown key; did you mean {by_end[far[0]]}?"
    return f"unknown key; known here: {', '.join(names)}"


def _section(path: tuple[str | int, ...]) -> str:
    return ".".join("*" if isinstance(part, int) else part for part in path)


def _known_names(path: tuple[str | int, ...], root: Node) -> tuple[str, ...]:
    if path == ("train",):
        node = root.child("train")
        adopted = node is not None and node.child("from") is not None
        for section in sections()["train"]:
            if (section is Adopted) == adopted:
                return tuple(name_of(attribute, field) for attribute, field in section.model_fields.items())
    return names_in(_section(path))


def _field(path: tuple[str | int, ...]) -> Any:
    """The schema's field at `path`, if it is one."""
    for section in sections().get(_section(path[:-1]), ()):
        for attribute, field in section.model_fields.items():
            if name_of(attribute, field) == path[-1]:
                return field
    return None


def choices(annotation: Any) -> tuple[Any, ...]:
    """The words that a field's type allows; empty when it is not a choice."""
    arguments = get_args(annotation)
    if str(annotation).startswith("typing.Literal"):
        return arguments
    return next((words for argument in arguments if (words := choices(argument))), ())


def _choice(path: tuple[str | int, ...], value: Any) -> str:
    if isinstance(value, str) and (why := OUT_OF_SCOPE.get(value.lower().replace("-", "_"))):
        return why
    # An item of a list or of a mapping has the words of its field.
    field = _field(path) or _field(path[:-1])
    words = [
        str(word).lower() if isinstance(word, bool) else str(word)
        for word in choices(field.annotation if field else None)
    ]
    meant = nearest(value, words) if isinstance(value, str) else ""
    asked = f"; did you mean {meant}?" if meant else ""
    return f"must be one of {', '.join(words)} (got {shown(value)}){asked}"


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and value < 1e9 else value


def _message(error: ErrorDetails, path: tuple[str | int, ...], root: Node) -> str:
    kind, value = error["type"], error["input"]
    context = error.get("ctx", {})
    if kind == "missing" or (kind == "model_type" and value is None):
        field = _field(path)
        return f"is required: {field.description}" if field else "is required"
    if kind == "extra_forbidden":
        return unknown_key(tuple(map(str, path)), _known_names(path[:-1], root))
    if kind == "literal_error":
        return _choice(path, value)
    if kind == "value_error":
        message = str(context["error"])
        return message if isinstance(value, (dict, list, tuple)) else f"{message} (got {shown(value)})"
    words = _WORDS.get(kind)
    if words is None:
        return f"is not valid (got {shown(value)})"
    return f"{words.format(**{name: _number(bound) for name, bound in context.items()})} (got {shown(value)})"


def _path(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Where an error is, without the tag of the kind of `train`, `data.source` or `export.quant`."""
    if location[:2] in (("data", "source"), ("export", "quant")):
        return (*location[:2], *location[3:])
    if location[:1] == ("train",) and len(location) > 1 and location[1] in _TAGS:
        return ("train", *location[2:])
    return location


def problems_of(failure: ValidationError, root: Node) -> list[Problem]:
    """One problem for each of the schema's errors."""
    problems = []
    for error in failure.errors(include_url=False):
        path = _path(error["loc"])
        node, depth = root.follow(path)
        written_short = depth < len(path) and not isinstance(node.value, (dict, list))
        name = ".".join(map(str, path[:depth] if written_short else path))
        problems.append(node.place.problem(name, _message(error, path, root)))
    return problems
