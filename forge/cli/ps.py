from __future__ import annotations

import click

from forge import report
from forge.cli.options import common


@click.command()
@common
def command() -> None:
    """List the servers that run in the background."""
    from forge.commands.serve import ps

    report.result(ps())
