"""Commands that run one stage of a recipe, with whatever comes before it."""

from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common, overrides_option, recipe_argument


def stage_command(stage: str, description: str) -> click.Command:
    """A command that ships a recipe up to and with `stage`; its result is that stage's facts."""

    @click.command(stage, help=description)
    @recipe_argument
    @overrides_option
    @common
    def command(recipe: Path, overrides: tuple[str, ...]) -> None:
        from forge.ship.drive import ship_until

        report.result(ship_until(recipe, overrides, stage))

    return command
