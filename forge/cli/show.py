from __future__ import annotations

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("run")
@common
def command(run: str) -> None:
    """Show what RUN holds: a run's name or directory, or a recipe that was shipped."""
    from forge.commands.describe import describe_run

    report.result(describe_run(run))
