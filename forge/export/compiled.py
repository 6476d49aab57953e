"""The fast kernels' library: compiled once by `forge setup`, found by the worker beside the converters.

A C++ compiler is there wherever pip built llama-cpp-python, which has no wheel on PyPI. Not covered:
whether the library's bytes are ggml's; `kernels` asks that in every run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import tempfile
from pathlib import Path

from forge import process
from forge.errors import MissingToolError

_SOURCES = (Path(__file__).parent / "kernels.cpp", Path(__file__).parent / "kernels_lanes.h")
# Nothing may be rounded once where ggml rounds twice; `sqrt` need not set errno.
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-w")


def library_file(tools: Path) -> Path:
    """Where the library of these very sources, for this kind of machine, lives in the directory `tools`."""
    made_of = hashlib.sha256(f"{platform.system()} {platform.machine()} {_FLAGS}".encode())
    for source in _SOURCES:
        made_of.update(source.read_bytes())
    return tools / f"kernels-{made_of.hexdigest()[:16]}.so"


def compile_kernels(tools: Path) -> Path:
    """Compile the library into `tools` with $CXX or c++, unless it is there; returns it.

    Raises `MissingToolError` where there is no compiler, where it fails, or where `tools` cannot be written.
    """
    library = library_file(tools)
    if library.is_file():
        return library
    try:
        _compile(library)
    except OSError as failure:
        raise MissingToolError(f"{library} cannot be written: {failure.strerror or failure}") from failure
    return library


def _compile(library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        finished = process.run([*compiler, *_FLAGS, str(_SOURCES[0]), "-o", str(made)])
        if finished.status or not made.is_file():
            lines = finished.output.strip().splitlines()[:1] or [f"status {finished.status}"]
            raise MissingToolError(f"{compiler[0]} could not compile the kernels: {lines[0]}")
        made.chmod(0o755)
        made.rename(library)
