"""A sweep: one recipe or several with several values of some fields, every combination a recipe of its own.

All of them are loaded before anything runs, so that what is wrong with any is reported at once, at its line
of the sweep's file. Not covered: values that follow from others by a formula (an alpha of twice the rank);
`runs` lists them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.errors import Problem, RecipeError
from forge.recipe.explain import nearest
from forge.recipe.load import Loaded, load, read_tree
from forge.recipe.starters import directory_of_starters
from forge.recipe.tree import Node, Position, Reader
from forge.recipe.words import NAME

MOST_RUNS = 1000
MOST_UNASKED = 100
"""So many runs are begun without being asked about."""

_KEYS = ("name", "recipe", "until", "fields", "runs")
_RECIPE = "recipe"
_LONGEST_NAME = 64


@dataclass(frozen=True)
class Combination:
    """One run: its recipe, and what of it is another than in other runs, by dotted field.

    `overrides` are those that make the recipe's file this run's.
    """

    loaded: Loaded
    values: Mapping[str, Any]
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.loaded.recipe.name

    @property
    def label(self) -> str:
        """What makes it another run, in words."""
        words = (f"{name.rpartition('.')[2]} {_text(value)}" for name, value in self.values.items())
        return ", ".join(words) or self.name


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, in order; `until` is the stage that each stops behind, None the last."""

    name: str
    path: Path
    until: str | None
    combinations: tuple[Combination, ...]


@dataclass
class _Draft:
    """A sweep as it is read: `fields` and each of `runs` are values by field, `places` where they stand."""

    name: str
    recipe: Path | None = None
    until: str | None = None
    fields: dict[str, list[Any]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    places: dict[str, Position] = field(default_factory=dict)


def shipped_sweeps() -> tuple[str, ...]:
    """The names of the sweeps that come with forge."""
    return tuple(sorted(path.stem for path in _shipped().glob("*.yaml")))


def _shipped() -> Path:
    return directory_of_starters().with_name("sweeps")


def load_sweep(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    recipe: Path | None = None,
    until: str | None = None,
    ask: Callable[[str], bool] = lambda question: False,
) -> Sweep:
    """Load a sweep's file, one that comes with forge by its name, or a recipe.

    `overrides` are `key=value` or `key=[value, ...]`, over what the file says of the field; `recipe` and
    `until` stand over the file's. Raises `RecipeError` with every problem of the file and of its recipes, for
    more than `MOST_RUNS` runs, and for more than `MOST_UNASKED` unless `ask` answers yes.
    """
    file = _shipped() / f"{path}.yaml" if not path.exists() and str(path) in shipped_sweeps() else path
    if not file.exists():
        names = ", ".join(shipped_sweeps())
        raise RecipeError(
            f"there is no sweep {path}", hint=f"name a file, or one that comes with forge: {names}"
        )
    root, problems = read_tree(file)
    if problems:
        raise _failure(file, problems)
    draft = _draft(file, root, problems)
    draft.recipe, draft.until = recipe or draft.recipe, until or draft.until
    for text in overrides:
        _override(draft, text, problems)
    needs_recipe = draft.recipe is None and root.child(_RECIPE) is None
    if needs_recipe and any(_RECIPE not in {**run, **draft.fields} for run in draft.runs):
        problems.append(root.place.problem(_RECIPE, "is required: the recipe whose fields are changed"))
    if not NAME.fullmatch(draft.name):
        message = f"{draft.name!r} must be usable as a file name: letters, digits, '.', '_' and '-'"
        problems.append(root.place.problem("name", message))
    if problems:
        raise _failure(file, problems)
    _refuse_too_many(draft, ask)
    return Sweep(draft.name, file, draft.until, _combinations(file, draft))


def _failure(path: Path, problems: Sequence[Problem]) -> RecipeError:
    different = list(dict.fromkeys(problems))
    count = "1 problem" if len(different) == 1 else f"{len(different)} problems"
    return RecipeError(
        f"{count} in the sweep {path}", problems=different, hint="correct it and run again; nothing was run"
    )


def _draft(path: Path, root: Node, problems: list[Problem]) -> _Draft:
    draft = _Draft(path.stem)
    if root.child("base") is not None:  # a recipe, whose fields the command line changes
        draft.recipe = path
        return draft
    for key, node in root.value.items():
        if key not in _KEYS:
            meant = nearest(key, _KEYS)
            known = f"did you mean {meant}?" if meant else f"known here: {', '.join(_KEYS)}"
            problems.append(node.place.problem(key, f"unknown key; {known}"))
        elif key in ("fields", "runs"):
            (_read_fields if key == "fields" else _read_runs)(draft, path, node, problems)
        elif not isinstance(node.value, str) or not node.value.strip():
            problems.append(node.place.problem(key, "must be text"))
        elif key == "recipe":
            draft.recipe = path.parent / node.value
        else:
            setattr(draft, key, node.value)
    return draft


def _read_fields(draft: _Draft, path: Path, node: Node, problems: list[Problem]) -> None:
    if not isinstance(node.value, dict) or not node.value:
        problems.append(node.place.problem("fields", "must be a mapping: field to list of values"))
        return
    for name, values in node.value.items():
        draft.places[name] = values.place
        draft.fields[name] = _values_of(name, values, problems)
        if name == _RECIPE:
            draft.fields[name] = [str(path.parent / str(value)) for value in draft.fields[name]]


def _values_of(name: str, node: Node, problems: list[Problem]) -> list[Any]:
    """A list's values, or the one that is no list; none twice."""
    if not isinstance(node.value, list):
        return [node.plain()]
    if not node.value:
        problems.append(node.place.problem(name, "is an empty list: give at least one value"))
    values = [value.plain() for value in node.value]
    for number, value in enumerate(values):
        if json.dumps(value) in map(json.dumps, values[:number]):
            problems.append(node.value[number].place.problem(name, f"{_text(value)} is there twice"))
    return values


def _read_runs(draft: _Draft, path: Path, node: Node, problems: list[Problem]) -> None:
    if not isinstance(node.value, list) or not node.value:
        what = "is an empty list" if node.value == [] else "must be a list"
        problems.append(node.place.problem("runs", f"{what}: give recipes, or mappings of fields to values"))
        return
    draft.runs = []
    for number, run in enumerate(node.value):
        if isinstance(run.value, str):
            draft.runs.append({_RECIPE: str(path.parent / run.value)})
        elif isinstance(run.value, dict) and run.value:
            values = {name: value.plain() for name, value in run.value.items()}
            draft.places |= {name: value.place for name, value in run.value.items()}
            if _RECIPE in values:
                values[_RECIPE] = str(path.parent / str(values[_RECIPE]))
            draft.runs.append(values)
        else:
            problems.append(run.place.problem(f"runs.{number}", "must be a recipe, or fields with values"))


def _override(draft: _Draft, text: str, problems: list[Problem]) -> None:
    key, equals, written = text.partition("=")
    key, reader = key.strip(), Reader(f"-o {key.strip()}", override=True)
    node = reader.read(written) if equals and key else None
    if node is None or node.empty:
        problems.extend(reader.problems or [Position(f"-o {text}").problem("", "must look like key=value")])
        return
    draft.places[key] = node.place
    draft.fields[key] = _values_of(key, node, problems)
    for run in draft.runs:
        run.pop(key, None)


def _refuse_too_many(draft: _Draft, ask: Callable[[str], bool]) -> None:
    count = sum(math.prod(map(len, _free(draft, run).values())) for run in draft.runs)
    shape = " x ".join(f"{len(values)} of {name}" for name, values in draft.fields.items() if len(values) > 1)
    shape = " x ".join(part for part in (f"{len(draft.runs)} runs" * (len(draft.runs) > 1), shape) if part)
    if count > MOST_RUNS:
        raise RecipeError(
            f"{count:,} runs ({shape}): a sweep has at most {MOST_RUNS:,}",
            hint="give fewer values, or list the combinations that matter under runs",
        )
    if count > MOST_UNASKED and not ask(f"{count} runs ({shape}): begin them?"):
        raise RecipeError(
            f"{count} runs ({shape}): more than {MOST_UNASKED} are begun only when you are sure",
            hint="give --yes, or fewer values",
        )


def _combinations(file: Path, draft: _Draft) -> tuple[Combination, ...]:
    """Every combination, loaded; raises `RecipeError` with what is wrong with any."""
    chosen = list(_products(draft))
    varied = _varied(chosen)
    names, problems = _names(draft, chosen, varied), []
    loaded: list[tuple[Loaded, tuple[str, ...], dict[str, Any]]] = []
    seen: dict[str, str] = {}
    for name, values in zip(names, chosen, strict=True):
        own = {key: value for key, value in values.items() if key not in (_RECIPE, "name")}
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in ({"name": name} | own).items())
        try:
            made = load(Path(values[_RECIPE]), overrides)
        except RecipeError as failure:
            problems += [_at_its_line(problem, draft.places) for problem in failure.problems]
            continue
        loaded.append((made, overrides, values))
        content = _content(made)
        if content in seen:
            problems.append(Problem(f"two runs are the same: {seen[content]} and {name}", file=str(file)))
        elif name in seen.values():
            problems.append(Problem(f"two runs have the name {name}", file=str(file)))
        seen.setdefault(content, name)
    if problems:
        raise _failure(file, problems)
    return tuple(
        Combination(made, {key: value for key, value in values.items() if key in varied}, overrides)
        for made, overrides, values in loaded
    )


def _content(loaded: Loaded) -> str:
    """The recipe's file and what it says, however its values are written."""
    fields = {**loaded.recipe.as_json(), "name": str(loaded.path.absolute())}
    return json.dumps(fields, sort_keys=True)


def _products(draft: _Draft) -> Iterator[dict[str, Any]]:
    """The values of each run by field, its recipe among them."""
    for run in draft.runs:
        free = _free(draft, run)
        for values in itertools.product(*free.values()):
            yield {_RECIPE: str(draft.recipe), **run, **dict(zip(free, values, strict=True))}


def _free(draft: _Draft, run: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The fields that the run does not set itself."""
    return {name: values for name, values in draft.fields.items() if name not in run}


def _varied(chosen: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The fields that are not the same in all runs."""
    names = dict.fromkeys(name for values in chosen for name in values if name != "name")
    return tuple(name for name in names if len({json.dumps(values.get(name)) for values in chosen}) > 1)


def _names(draft: _Draft, chosen: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> list[str]:
    """A name for each run that says its values, so that it stays the same when others are added.

    The first form that gives every run one of its own which can name files: with the fields of numbers, with
    values only, with a digest.
    """
    for with_fields in (True, False):
        names = ["-".join([draft.name, *_pieces(draft, values, varied, with_fields)]) for values in chosen]
        if len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST_NAME:
            break
    else:
        names = [f"{draft.name[: _LONGEST_NAME - 9]}-{_digest(values)}" for values in chosen]
    return [str(values.get("name", name)) for name, values in zip(names, chosen, strict=True)]


def _pieces(
    draft: _Draft, values: Mapping[str, Any], varied: Sequence[str], with_fields: bool
) -> Iterator[str]:
    for name in varied:
        if name not in values:
            continue
        text, end = _text(values[name]), name.rpartition(".")[2]
        if name == _RECIPE:
            text = Path(values[name]).stem
        elif with_fields and end != draft.name and not isinstance(values[name], str | list | tuple):
            text = end + text
        yield re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")


def _digest(values: Mapping[str, Any]) -> str:
    named = {**values, _RECIPE: Path(values[_RECIPE]).name}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _at_its_line(problem: Problem, places: Mapping[str, Position]) -> Problem:
    """A problem of an override at the line where the sweep's file has its value."""
    place = places.get(problem.file.removeprefix("-o ")) if problem.file.startswith("-o ") else None
    return Problem(problem.message, problem.field, place.file, place.line) if place else problem
