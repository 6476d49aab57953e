from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from forge import report
from forge.cli.options import common, overrides_option, refuse_idle


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@overrides_option
@click.option("--base", help="A base instead of a recipe: hub id, directory, builtin:tiny.")
@click.option(
    "--method",
    type=click.Choice(["qlora", "int8", "lora", "full"]),
    default="qlora",
    show_default=True,
    help="How the base is held, or that it is trained whole.",
)
@click.option("--length", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of a row.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows per step.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Rank of the adapter.")
@common
def command(
    recipe: Path | None,
    overrides: tuple[str, ...],
    base: str | None,
    method: Literal["qlora", "int8", "lora", "full"],
    length: int,
    batch: int,
    rank: int,
) -> None:
    """Say how much memory training takes: of RECIPE, or of --base with --method, --length and --batch.

    From headers and config.json only, against the device that would train here. Says whether it fits, on
    which GPUs it would, and the cheapest change that makes it fit.
    """
    from forge.commands.estimate import estimate_base, estimate_recipe
    from forge.ship.drive import plan

    if (recipe is None) == (base is None):
        raise click.UsageError("name a recipe or --base")
    refuse_idle(recipe, overrides)
    if base is not None:
        report.result(estimate_base(base, method=method, length=length, batch=batch, rank=rank))
    else:
        assert recipe is not None
        ship, _ = plan(recipe, overrides, fetch=True)
        report.result(estimate_recipe(ship))
