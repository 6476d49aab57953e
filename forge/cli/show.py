from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("run")
@click.option(
    "--bom", type=click.Path(path_type=Path), help="Write a CycloneDX bill of materials (JSON) to this file."
)
@common
def command(run: str, bom: Path | None) -> None:
    """Show what RUN holds: a run's name or directory, or a recipe that was shipped."""
    from forge.commands.describe import describe_run

    shown = describe_run(run)
    if bom:
        from forge.commands.bom import write_bom

        write_bom(Path(str(shown["run"])), bom)
    report.result(shown)
