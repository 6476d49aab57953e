from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common, overrides_option, recipe_argument


@click.command()
@recipe_argument
@overrides_option
@click.option("--fetch", is_flag=True, help="Read the headers of a hub base that is not here.")
@click.option(
    "--deep",
    is_flag=True,
    help="Lay the model out without weights and look for values that are not finite, as a ship does before "
    "training.",
)
@common
def command(recipe: Path, overrides: tuple[str, ...], fetch: bool, deep: bool) -> None:
    """Say what a ship of RECIPE would run and why, and what it needs.

    Writes nothing and asks no hub, unless `--fetch` is given. With `-v` every value of the recipe is
    shown with its source.
    """
    from forge.commands.describe import describe_plan
    from forge.ship.drive import plan

    ship, planned = plan(recipe, overrides, fetch=fetch)
    report.result(describe_plan(ship, planned, deep=deep))
