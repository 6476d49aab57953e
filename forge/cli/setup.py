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
    """Fetch what an install does not bring: llama.cpp's converters, of the pinned commit."""
    from forge.store.artifacts import open_store
    from forge.tools.foreign import warn_of_foreign_forge
    from forge.tools.llama_cpp import install_converters

    warn_of_foreign_forge()
    directory = install_converters(open_store().root, archive)
    report.success(f"ready: the converters are in {directory}")
    report.result({"ready": True, "converters": str(directory)})
