"""The commented recipes that `forge init` writes.

Their files are in `templates/recipes/` of a clone and in `forge/_shipped/` of an installed package.
"""

from __future__ import annotations

import re
from pathlib import Path

from forge.errors import RecipeError
from forge.recipe.explain import nearest
from forge.recipe.tree import Reader
from forge.recipe.words import NAME

_NAME_LINE = re.compile(r"^name:[^#\n]*?(?=\s*(?:#.*)?$)", re.MULTILINE)


def directory_of_starters() -> Path:
    """Where the starters are. Raises `RecipeError` when the package was installed without them."""
    package = Path(__file__).parents[1]
    for root in (package / "_shipped", package.parent):
        if (root / "templates" / "recipes" / "quickstart.yaml").is_file():
            return root / "templates" / "recipes"
    raise RecipeError("the starter recipes are missing from this installation", hint="install it again")


def kinds() -> tuple[str, ...]:
    """The names of the starters."""
    return tuple(sorted(path.stem for path in directory_of_starters().glob("*.yaml")))


def write_kind(name: str, kind: str, directory: Path) -> Path:
    """Write the starter `kind` as `directory/name.yaml`, its `name` filled in; the file's path.

    Raises `RecipeError` for an unknown kind, a name that is no file name, a file that exists, and
    a directory that cannot be written.
    """
    if kind not in kinds():
        meant = nearest(kind, kinds())
        asked = f"; did you mean {meant}?" if meant else ""
        raise RecipeError(
            f"there is no starter recipe {kind}{asked}", hint=f"there are: {', '.join(kinds())}"
        )
    text = (directory_of_starters() / f"{kind}.yaml").read_text(encoding="utf-8")
    return write_starter(name, text, directory)


def write_starter(name: str, text: str, directory: Path) -> Path:
    """Write a recipe as `directory/name.yaml`, its `name` filled in; raises as `write`."""
    if not NAME.fullmatch(name):
        raise RecipeError(
            f"{name!r} cannot name a recipe", hint="use letters, digits, '.', '_' and '-', a letter first"
        )
    read = Reader("name").read(name)
    written = name if read and read.value == name else f'"{name}"'
    path = directory / f"{name}.yaml"
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(_NAME_LINE.sub(f"name: {written}", text, count=1))
    except FileExistsError:
        if not path.exists():
            raise RecipeError(f"{directory} is not a directory", hint="choose another directory") from None
        raise RecipeError(f"{path} exists already", hint="choose another name or directory") from None
    except OSError as failure:
        raise RecipeError(
            f"{path} cannot be written: {failure.strerror}", hint="choose another directory"
        ) from None
    return path
