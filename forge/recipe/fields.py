"""The schema and a recipe as dotted names: `train.lora.r`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from forge.recipe.schema import Recipe, Section


def name_of(attribute: str, field: FieldInfo) -> str:
    """A field's name in the file."""
    return field.alias or attribute


def _sections_in(annotation: Any) -> Iterator[tuple[type[Section], bool]]:
    """The sections that a field holds, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, False
    for argument in get_args(annotation):
        for section, listed in _sections_in(argument):
            yield section, listed or get_origin(annotation) is tuple


def _walk(prefix: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    yield prefix, section
    for attribute, field in section.model_fields.items():
        for below, listed in _sections_in(field.annotation):
            path = f"{prefix}.{name_of(attribute, field)}".removeprefix(".")
            yield from _walk(path + ".*" if listed else path, below)


@functools.cache
def sections() -> Mapping[str, tuple[type[Section], ...]]:
    """Every section by its dotted name (`""` is the recipe, `smoke.*` an item of a list).

    `train` has two: a training run and an adopted adapter.
    """
    sections: dict[str, tuple[type[Section], ...]] = {}
    for path, section in _walk("", Recipe):
        sections[path] = (*sections.get(path, ()), section)
    return sections


def names_in(path: str) -> tuple[str, ...]:
    """The fields of the section called `path`; empty when there is no such section."""
    return tuple(
        dict.fromkeys(
            name_of(attribute, field)
            for section in sections().get(path, ())
            for attribute, field in section.model_fields.items()
        )
    )


@functools.cache
def all_names() -> tuple[str, ...]:
    """Every field of the schema, dotted."""
    return tuple(f"{path}.{name}".removeprefix(".") for path in sections() for name in names_in(path))


def values(recipe: Recipe) -> dict[str, object]:
    """Every leaf of a recipe: dotted name to JSON value, in the schema's order.

    A list of sections is numbered (`smoke.0.prompt`); an empty one, and `train: none`, are leaves.
    """
    return dict(_leaves("", recipe, recipe.as_json()))


def _leaves(path: str, value: Any, dumped: Any) -> Iterator[tuple[str, Any]]:
    prefix = f"{path}." if path else ""
    if isinstance(value, Section):
        for attribute, field in type(value).model_fields.items():
            name = name_of(attribute, field)
            yield from _leaves(prefix + name, getattr(value, attribute), dumped[name])
    elif isinstance(value, tuple) and value and isinstance(value[0], Section):
        for index, item in enumerate(value):
            yield from _leaves(f"{prefix}{index}", item, dumped[index])
    else:
        yield path, dumped
