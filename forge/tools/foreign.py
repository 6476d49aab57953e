"""Another program called `forge` on the PATH: several packages install one."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from forge import report

_OURS = "forge-ship"


def foreign_forge() -> Path | None:
    """The `forge` that a shell would start, when that is not this installation's."""
    program = shutil.which("forge")
    if program is None or Path(program).resolve() in {script.resolve() for script in _our_scripts()}:
        return None
    return Path(program)


def _our_scripts() -> list[Path]:
    """The `forge` beside the interpreter, and where the installer says that it put one."""
    scripts = [Path(sys.executable).with_name("forge")]
    try:
        files = distribution(_OURS).files or []
    except PackageNotFoundError:
        files = []
    return scripts + [Path(str(file.locate())) for file in files if file.name == "forge"]


def warn_of_foreign_forge() -> None:
    if other := foreign_forge():
        report.warning(
            f"the `forge` on your PATH is another program: {other}. "
            f"Use {Path(sys.executable).with_name('forge')} or `python -m forge`."
        )
