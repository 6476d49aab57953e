from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--node", type=int, required=True, help="Which of the machines this one is; 1 is the second.")
@common
def command(file: Path, node: int) -> None:
    """Take part in a training on several machines (train.nodes) with this one.

    `forge ship` shows the command; FILE lies in its store, which every machine must see under the same path.
    """
    from forge.commands.join import join

    report.result(join(file, node))
