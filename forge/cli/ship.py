from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from forge import report
from forge.cli.options import common, overrides_option, recipe_argument


@click.command()
@recipe_argument
@overrides_option
@click.option("--from", "from_stage", metavar="STAGE", help="Run again from this stage on.")
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--retrain", is_flag=True, help="Train again even though the adapter is there.")
@click.option("--retry-smaller", is_flag=True, help="Out of memory: train again with fewer rows at once.")
@click.option("--locked", is_flag=True, help="Repeat the ship in the lock, or say what differs from it.")
@common
def command(recipe: Path, overrides: tuple[str, ...], retry_smaller: bool, **options: Any) -> None:
    """Run the whole pipeline of RECIPE: train, check, export, serve, ask.

    What is already made is found again; what was stopped goes on. Exit codes: 2 recipe or data,
    3 a missing tool, 4 a stage, 5 a check or a smoke query, 130 interrupted.
    """
    from forge.ship.drive import ship

    if retry_smaller:
        overrides = (*overrides, "train.retry_smaller=true")
    report.result(ship(recipe, overrides, **options))
