from __future__ import annotations

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.option("--delete", is_flag=True, help="Remove it; without this, only show.")
@click.option("--adapters", is_flag=True, help="Adapters too: they cannot be made again for nothing.")
@click.option("--partials", is_flag=True, help="Unfinished work too, such as training checkpoints.")
@common
def command(delete: bool, adapters: bool, partials: bool) -> None:
    """Show what no run uses, and how many bytes it takes."""
    from forge.commands.describe import describe_garbage

    report.result(describe_garbage(delete=delete, adapters=adapters, partials=partials))
