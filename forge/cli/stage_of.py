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
        report.result(run_stage(recipe, overrides, stage))

    return command


def run_stage(recipe: Path, overrides: tuple[str, ...], stage: str) -> dict[str, object]:
    """Ship up to `stage` and return its facts beside the summary of the ship."""
    from forge.stages.drive import ship
    from forge.stages.record import read_manifest

    fields = ship(recipe, overrides, until=stage)
    facts = read_manifest(Path(fields["run"])).get("facts", {}).get(stage, {})
    return {**fields, **facts}
