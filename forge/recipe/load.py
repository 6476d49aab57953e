"""Read a recipe: YAML, overrides and old names become a `Recipe`, or every problem at once.

Not covered: what the named files and hub ids hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from forge import report
from forge.errors import Problem, RecipeError
from forge.files import small_text
from forge.recipe import checks, presets, translate
from forge.recipe.explain import problems_of
from forge.recipe.fields import sections, values
from forge.recipe.schema import Recipe
from forge.recipe.tree import Node, Position, Reader

_EXAMPLE = "`forge init` writes a recipe to start from"


@dataclass(frozen=True)
class ValueSource:
    """Where a value comes from: `where` is `recipe.yaml:12`, `-o train.lora.r`, or what derived it."""

    kind: Literal["default", "recipe", "override", "derived"]
    where: str


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, where it stands, where each of its values comes from, and what looks wrong.

    Relative paths in the recipe, overrides too, are relative to `directory`.
    """

    recipe: Recipe
    path: Path
    directory: Path
    sources: Mapping[str, ValueSource]
    warnings: tuple[str, ...]


def load(path: Path, overrides: Sequence[str] = (), *, text: str | None = None) -> Loaded:
    """Load the recipe at `path`; `overrides` are `key=value` with a YAML value, later ones win.

    With `text` that is the recipe, and `path` only says where it would lie. Raises `RecipeError` with every
    problem of the file, in its order, then those of the overrides.
    """
    root, problems = read_tree(path, text)
    translation = translate.translate(root)
    problems += translation.problems
    warnings = translation.warnings
    for text in overrides:
        noted, wrong = _override(root, text)
        warnings += noted
        problems += wrong
    problems += _fill_empty_sections(root)
    presets.fill_preset(root)
    if checks.lacks_data(root):
        problems.append(_at(root, "data").problem("data", "is required to train: name its source"))
    recipe, wrong = _validate(root)
    problems += wrong
    faults = list(checks.missing_files(root, path.parent))
    if recipe is not None:
        faults += checks.contradictions(recipe)
    problems += [_at(root, field).problem(field, message) for field, message in faults]
    if recipe is None or problems:
        for warning in warnings:  # what an old name was taken for is part of what is wrong
            report.warning(warning)
        raise _failure(path, problems)
    doubts = [str(_at(root, field).problem(field, doubt)) for field, doubt in checks.doubts(recipe, root)]
    return Loaded(recipe, path, path.absolute().parent, _sources(recipe, root), (*warnings, *doubts))


def _failure(path: Path, problems: Iterable[Problem]) -> RecipeError:
    """The file's problems first and in its order; the same one is reported once."""
    ordered = sorted(dict.fromkeys(problems), key=lambda problem: (not problem.line, problem.line))
    count = "1 problem" if len(ordered) == 1 else f"{len(ordered)} problems"
    return RecipeError(f"{count} in the recipe {path}", problems=ordered, hint="correct it and run again")


def _unreadable(path: Path, message: str, hint: str = _EXAMPLE) -> RecipeError:
    return RecipeError(f"{path}: {message}", hint=hint, problems=[Problem(message, file=str(path))])


def _read(path: Path) -> str:
    try:
        return small_text(path)
    except FileNotFoundError:
        raise _unreadable(path, "no such recipe") from None
    except IsADirectoryError:
        raise _unreadable(path, "is a directory, not a recipe") from None
    except UnicodeDecodeError:
        raise _unreadable(path, "is not UTF-8 text", "save it as UTF-8") from None
    except OSError as failure:
        raise _unreadable(path, f"cannot be read: {failure.strerror}", "check its permissions") from None


def read_tree(path: Path, text: str | None = None) -> tuple[Node, list[Problem]]:
    """The mapping in the file at `path`, or in `text`, and what is wrong with it as YAML.

    Raises `RecipeError` for what is no mapping at all.
    """
    reader = Reader(str(path))
    root = reader.read(_read(path) if text is None else text)
    if root is None and reader.problems:
        raise _failure(path, reader.problems)
    if root is None or root.empty:
        raise _unreadable(path, "is empty")
    if not isinstance(root.value, dict):
        raise _unreadable(path, "is not a mapping of fields such as `name: yoda`")
    return root, reader.problems


def _override(root: Node, text: str) -> tuple[list[str], list[Problem]]:
    """Put one `key=value` into the tree: what to warn of, and what is wrong with it."""
    key, equals, written = text.partition("=")
    key = key.strip()
    path = tuple(key.split("."))
    place = Position(f"-o {key}")
    if not equals or not all(path):
        return [], [Position(f"-o {text}").problem("", "must look like key=value")]
    reader = Reader(place.file, override=True)
    node = reader.read(written)
    if reader.problems:
        return [], reader.problems
    if node is None or node.empty:
        return [], [place.problem(key, "has no value; `null` unsets a field")]
    old = translate.look_up(path)
    if old:
        warning, problem = translate.rename(root, path, node, old, place, replace=True)
        return [warning] if warning else [], [problem] if problem else []
    in_the_way = translate.place_at(root, path, node, replace=True)
    return [], [place.problem(key, f"cannot be set: {in_the_way}")] if in_the_way else []


def _fill_empty_sections(root: Node) -> list[Problem]:
    """A section with nothing under it holds its defaults; for `train` that would be a guess."""
    for section in sections():
        path = tuple(section.split("."))
        node, depth = root.follow(path)
        if depth < len(path) or not node.empty:
            continue
        if section == "train":
            node.value, node.empty = {}, False
            hint = "write `train: {}` for the defaults or `train: none` to ship the base as it is"
            return [node.place.problem("train", f"is empty; {hint}")]
        if section not in ("base", "data", "export.quant"):
            node.value, node.empty = {}, False
    return []


def _validate(root: Node) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate(root.plain()), []
    except ValidationError as failure:
        return None, problems_of(failure, root)


def _at(root: Node, field: str) -> Position:
    return root.follow(_parts(field))[0].place


def _parts(field: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in field.split("."))


def _sources(recipe: Recipe, root: Node) -> dict[str, ValueSource]:
    """Where every leaf comes from; `base: SPEC` and its like are the places of all their parts."""
    sources = {}
    for field, value in values(recipe).items():
        path = _parts(field)
        node, depth = root.follow(path)
        if depth < len(path) and (value is None or path[-1] not in ("id", "source", "revision")):
            sources[field] = ValueSource("default", "default")
            continue
        if depth < len(path):
            node = node.child("id") or node.child("source") or node.child("from") or node
        sources[field] = ValueSource("override" if node.place.is_override else "recipe", str(node.place))
    return sources
