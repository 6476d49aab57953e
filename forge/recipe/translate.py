"""A recipe that has names of other tools and older releases, under the names that it has here.

A name with a counterpart is accepted and reported; one without is a problem that says why. A name is
looked up only where it is not a field of this schema, so no field is ever shadowed.

Not covered: whole configuration files of these tools.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forge.errors import Problem
from forge.recipe.explain import shown
from forge.recipe.fields import names_in, sections
from forge.recipe.old_names import DROP, OLD_NAMES, Old
from forge.recipe.tree import Node, Position

_ORDER = sorted(sections(), key=lambda path: path.count(".") + bool(path))


@dataclass
class Translation:
    """What was found in a tree: warnings for the user, and what cannot be translated."""

    warnings: list[str]
    problems: list[Problem]


def _says_what_is(old: Old, value: Any) -> bool:
    """Whether a name without a counterpart has a value that changes nothing: nothing at all, too."""
    return value is None or (isinstance(value, str | int | float) and value in (old.values or ()))


def _renamed(old: Old, node: Node) -> Node | None:
    """The node under its new name; None to leave it out. Raises ValueError with the reason."""
    if node.value is None and (old.values is not None or not old.new):
        return None
    if old.values is None:
        return node
    plain = node.plain()
    try:
        value = old.values[plain[0] if isinstance(plain, tuple) and len(plain) == 1 else plain]
    except (KeyError, TypeError):
        raise ValueError(" or ".join(str(value).lower() for value in old.values)) from None
    return None if value is DROP else Node(value, node.place)


def place_at(root: Node, path: tuple[str, ...], node: Node, *, replace: bool) -> str:
    """Put `node` at `path`, making sections on the way; what stands in the way, or "" when it is done."""
    above = root
    for count, part in enumerate(path[:-1], start=1):
        below = above.value.get(part)
        if below is None or below.empty:
            below = above.value[part] = Node({}, node.place)
        elif part == "base" and isinstance(below.value, str):
            below = above.value[part] = Node({"id": Node(below.value, below.place)}, below.place)
        elif not isinstance(below.value, dict):
            value = "none" if below.value is None else shown(below.value)
            return f"{'.'.join(path[:count])} is {value} ({below.place}) and holds no fields"
        above = below
    there = above.value.get(path[-1])
    if there is not None and not replace and there.value != node.value:
        return f"{'.'.join(path)} is given too ({there.place}); keep one"
    above.value[path[-1]] = node
    return ""


def look_up(path: tuple[str, ...]) -> Old | None:
    """The entry of a dotted name when its section does not know its last part."""
    section = ".".join(path[:-1])
    if section not in sections() or path[-1] in names_in(section):
        return None
    old = OLD_NAMES.get(".".join(path)) or OLD_NAMES.get(path[-1])
    return None if old is None or old.new == ".".join(path) else old


def rename(
    root: Node, path: tuple[str, ...], node: Node, old: Old, place: Position, *, replace: bool
) -> tuple[str, Problem | None]:
    """Move one old name's value to its new place: a warning, or a problem."""
    name = ".".join(path)
    if not old.new and not _says_what_is(old, node.value):
        return "", place.problem(name, f"is not a field: {old.why}")
    try:
        renamed = _renamed(old, node)
    except ValueError as wanted:
        return "", place.problem(name, f"is now {old.new}; of its values only {wanted} has a counterpart")
    named = f"{place}: {name}"
    if renamed is None:
        return f"{named} says what is the case anyway; leave it out", None
    in_the_way = place_at(root, tuple(old.new.split(".")), renamed, replace=replace)
    if in_the_way:
        return "", place.problem(name, f"is now {old.new}, but {in_the_way}")
    return f"{named} is now {old.new}", None


def _base_called_model(path: tuple[str, ...], key: str, node: Node) -> Old | None:
    """`model: NAME`, or with a base's fields: before the section of that name it was the base."""
    if path or key != "model":
        return None
    held = node.value.keys() if isinstance(node.value, dict) else set()
    is_base = isinstance(node.value, str) or (held and not held & set(names_in("model")))
    return Old("base") if is_base else None


def _both_off(section: str, holder: Node) -> str:
    """`bf16: false` and `fp16: false` together ask for float32; a warning when that was so."""
    pair = [holder.value.get(name) for name in ("bf16", "fp16")]
    if section not in ("", "train") or any(node is None or node.value is not False for node in pair):
        return ""
    place = pair[0].place
    for name in ("bf16", "fp16"):
        del holder.value[name]
    target = ("train", "dtype") if not section else ("dtype",)
    if in_the_way := place_at(holder, target, Node("fp32", place), replace=False):
        return f"{place}: bf16 and fp16 are both off, but {in_the_way}"
    return f"{place}: bf16 and fp16 are both off: that is now train.dtype: fp32"


def translate(root: Node) -> Translation:
    """Rename every old name of a tree in place. Sections first, then what they hold."""
    translation = Translation([], [])
    for section in _ORDER:
        path = tuple(section.split(".")) if section else ()
        holder, depth = root.follow(path)
        if depth < len(path) or not isinstance(holder.value, dict):
            continue
        if warning := _both_off(section, holder):
            translation.warnings.append(warning)
        for key in list(holder.value):
            old = look_up((*path, key)) or _base_called_model(path, key, holder.value[key])
            if old is None:
                continue
            node = holder.value.pop(key)
            warning, problem = rename(root, (*path, key), node, old, node.place, replace=False)
            translation.warnings += [warning] if warning else []
            translation.problems += [problem] if problem else []
    return translation
