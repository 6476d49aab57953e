"""`forge init`: a commented recipe to start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from forge import report
from forge.recipe.starters import kinds, write_kind, write_starter


def init(name: str, kind: str, directory: Path) -> Mapping[str, object]:
    """Write `name`.yaml of a kind; raises `RecipeError` for one that there is not."""
    path = write_kind(name, kind, directory)
    report.success(f"wrote {path}; next: forge plan {path}")
    return {"path": str(path)}


def init_for(
    name: str, base: str, data: str, directory: Path, overrides: Sequence[str] = ()
) -> Mapping[str, object]:
    """Write the recipe that fits a base and some rows; raises `DataError` where none would.

    `overrides` are settings of `data`, which the recipe gets.
    """
    from forge.commands.first_recipe import first_recipe

    path = write_starter(name, first_recipe(name, base, data, directory, overrides), directory)
    report.success(f"wrote {path}; next: forge plan {path}")
    return {"path": str(path)}


def list_kinds() -> Mapping[str, object]:
    report.output("\n".join(kinds()))
    return {"kinds": list(kinds())}
