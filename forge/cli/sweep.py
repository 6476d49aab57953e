from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("sweep", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "overrides",
    multiple=True,
    metavar="KEY=VALUES",
    help="The values of a field, one or a list such as [4, 8], over what SWEEP says of it.",
)
@click.option("--recipe", type=click.Path(path_type=Path), help="The recipe, in place of SWEEP's own.")
@click.option("--until", metavar="STAGE", help="Stop each run after this stage.")
@click.option("--plan", "is_plan", is_flag=True, help="Show the runs and what each would do; run nothing.")
@click.option(
    "--devices", metavar="GPUS", help="Spread the runs over these GPUs, such as 0,1, or auto for all."
)
@click.option("--yes", "is_sure", is_flag=True, help="Begin more than 100 runs, at most 1,000.")
@common
def command(
    sweep: Path,
    overrides: tuple[str, ...],
    recipe: Path | None,
    until: str | None,
    devices: str | None,
    is_plan: bool,
    is_sure: bool,
) -> None:
    """Ship every run of SWEEP, one after another or one on each GPU, and show what came of them.

    SWEEP is a file that names a recipe and the values of its fields, one that comes with forge (attention,
    learning_rate, memory, packing, quantization, rank, targets), or a recipe, whose fields -o changes. Every
    run is checked before the first begins. One that fails is recorded and the others go on; the exit code is
    then that of the failure, 4 for several kinds. Started again, what is finished comes from the store. A
    table, a page with plots and the first plot as an SVG file are left in runs/. More than 100 runs are asked
    about first; where nobody can be asked, --yes begins them.
    """
    from forge.commands.sweep import SweepOptions, plan_sweep, run_sweep

    options = SweepOptions(overrides, recipe, until, is_sure, devices)
    report.result(plan_sweep(sweep, options) if is_plan else run_sweep(sweep, options))
