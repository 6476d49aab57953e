from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.option(
    "--from", "archive", type=click.Path(path_type=Path), help="The source archive, instead of fetching it."
)
@common
def command(archive: Path | None) -> None:
    """Get what an install does not bring: llama.cpp's converters, of the pinned commit, and fast kernels.

    The kernels quantize Q4_K and Q6_K to llama.cpp's own bytes in a fraction of the time. A C++ compiler
    (CXX, or c++) makes them; without one llama.cpp's are used.
    """
    from forge.commands.setup import setup

    report.result(setup(archive))
