from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import base_option, common, optional_recipe, overrides_option, refuse_idle
from forge.errors import RecipeError


@click.command()
@optional_recipe
@overrides_option
@base_option
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter's directory.")
@common
def command(recipe: Path | None, overrides: tuple[str, ...], base: str | None, adapter: Path | None) -> None:
    """Check the adapter of RECIPE, or that of --adapter against --base.

    peft's own status on a base without weights, and the numbers in the file: irregular, inactive,
    not finite, zero or not fitting is exit 5 or 2, with the layers' names.
    """
    refuse_idle(recipe, overrides)
    if recipe is not None:
        from forge.ship.drive import ship_until

        report.result(ship_until(recipe, overrides, "validate"))
        return
    if not (base and adapter):
        raise RecipeError("give a RECIPE, or both --base and --adapter", hint="see: forge validate --help")
    from forge.commands.validate import validate

    report.result(validate(base, adapter))
