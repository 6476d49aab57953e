"""`forge setup`: what an install does not bring, into the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forge import report
from forge.errors import MissingToolError
from forge.export.compiled import compile_kernels
from forge.store.artifacts import open_store
from forge.tools.foreign import warn_of_foreign_forge
from forge.tools.llama_cpp import install_converters


def setup(archive: Path | None) -> Mapping[str, object]:
    """Get llama.cpp's converters, of `archive` or fetched, and compile the kernels where a compiler is."""
    warn_of_foreign_forge()
    directory = install_converters(open_store().root, archive)
    kernels = None
    try:
        kernels = str(compile_kernels(directory.parent))
    except MissingToolError as error:
        report.info(f"{error}: Q4_K and Q6_K are quantized by llama.cpp's kernels, which takes longer")
    report.success(f"ready: the converters are in {directory}")
    return {"ready": True, "converters": str(directory), "kernels": kernels}
