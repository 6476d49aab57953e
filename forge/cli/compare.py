from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write it as a page.")
@common
def command(first: str, second: str, page: Path | None) -> None:
    """Show two runs side by side, each a RUN's name or directory.

    What their recipes differ in, what was learned, the certificates' figures, sizes and times, and the
    answers to questions that both were asked. Nothing is run.
    """
    from forge.commands.compare import compare_runs

    report.result(compare_runs(first, second, page))
