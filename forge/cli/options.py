"""Options that every command takes."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from forge.errors import RecipeError

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


class FiniteRange(click.FloatRange):
    """A range of numbers that ends: click's own lets nan and inf in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite.", param, ctx)
        return number


POSITIVE = FiniteRange(0, min_open=True)
SHARE = FiniteRange(0, 1, min_open=True)
recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
# Of commands that work on a recipe, or on files that their options name.
optional_recipe = click.argument("recipe", type=click.Path(path_type=Path), required=False)
base_option = click.option("--base", help="The base: a directory, a hub id, builtin:tiny.")
merge_base_option = click.option(
    "--merge-base",
    type=click.Choice(["original", "nf4"]),
    default="original",
    show_default=True,
    help="What the adapter is merged into; nf4: the base as QLoRA rounded it.",
)
overrides_option = click.option(
    "-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a field of the recipe for this call."
)


def refuse_idle(recipe: Path | None, overrides: tuple[str, ...]) -> None:
    """Raise `RecipeError` for an option that would do nothing: of files beside a recipe, `-o` without one."""
    if recipe is None:
        if overrides:
            raise RecipeError(
                f"-o {overrides[0]}: sets a field of a recipe, and none is named",
                hint="name the recipe, or use the command's own options",
            )
        return
    context = click.get_current_context()
    named = [
        parameter.opts[-1]
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
        and parameter.name not in ("overrides", "verbose", "offline", "as_json")
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]
    if named:
        raise RecipeError(
            f"{', '.join(named)}: not beside a recipe, which says it itself",
            hint="leave it out, or set a field of the recipe with -o",
        )


def named_files(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Path]:
    """The callback of an option that takes NAME=FILE, each name once."""
    named: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not name or not equals or not path or name in named:
            raise click.BadParameter(f"{value}: NAME=FILE, each name once")
        named[name] = Path(path)
    return named


def byte_count(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The callback of an option that takes a size such as 500M or 4G."""
    if value is None:
        return None
    size = re.fullmatch(r"([1-9]\d{0,5})([MG])", value, re.IGNORECASE)
    if size is None:
        raise click.BadParameter(f"{value}: a whole number with M or G behind it, such as 500M or 4G")
    return int(size[1]) * {"M": 10**6, "G": 10**9}[size[2].upper()]


def common(function: Callable[Parameters, Value]) -> Callable[Parameters, Value]:
    """`-v`, `--offline` and `--json`; `cli.main` reads the first and last before parsing."""

    @click.option("-v", "verbose", is_flag=True, help="Say more.")
    @click.option("--offline", is_flag=True, help="Never ask a hub.")
    @click.option(
        "--json", "as_json", is_flag=True, help="The last line of standard output is one JSON object."
    )
    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Value:
        kwargs.pop("verbose")
        kwargs.pop("as_json")
        if kwargs.pop("offline"):
            # huggingface_hub's own switch, which workers inherit too.
            os.environ["HF_HUB_OFFLINE"] = "1"
        return function(*args, **kwargs)

    return wrapped
