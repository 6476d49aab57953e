from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("target")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The archive: .tar or .tar.gz.")
@click.option("--context", type=click.IntRange(64), help="Context in tokens.")
@common
def command(target: str, out: Path, context: int | None) -> None:
    """Pack TARGET, a run or a GGUF file, with a server for a computer without network or GPU."""
    from forge.commands.bundle import bundle

    report.result(bundle(target, out, context))
