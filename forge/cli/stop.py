from __future__ import annotations

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("name", required=False)
@common
def command(name: str | None) -> None:
    """Stop the background server NAME, or all of them."""
    from forge.commands.serve import stop

    report.result(stop(name))
