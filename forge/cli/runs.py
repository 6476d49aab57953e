from __future__ import annotations

import click

from forge import report
from forge.cli.options import common


@click.command()
@common
def command() -> None:
    """List the runs that this store knows."""
    from forge.commands.describe import describe_runs

    report.result({"runs": describe_runs()})
