from __future__ import annotations

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("run")
@common
def command(run: str) -> None:
    """Serve RUN (a name or a directory) and ask its recipe's smoke queries again; exit 5 if one fails."""
    from forge.commands.ask import smoke

    report.result(smoke(run))
