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
    from forge.errors import MissingToolError
    from forge.export.compiled import compile_kernels
    from forge.store.artifacts import open_store
    from forge.tools.foreign import warn_of_foreign_forge
    from forge.tools.llama_cpp import install_converters

    warn_of_foreign_forge()
    directory = install_converters(open_store().root, archive)
    kernels = None
    try:
        kernels = str(compile_kernels(directory.parent))
    except MissingToolError as error:
        report.info(f"{error}: Q4_K and Q6_K are quantized by llama.cpp's kernels, which takes longer")
    report.success(f"ready: the converters are in {directory}")
    report.result({"ready": True, "converters": str(directory), "kernels": kernels})
