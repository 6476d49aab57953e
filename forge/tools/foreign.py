"""Another program called `forge` on the PATH: several packages install one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from forge import report


def foreign_forge() -> Path | None:
    """The `forge` that a shell would start, when that is not this installation's."""
    found = shutil.which("forge")
    if found is None:
        return None
    ours = Path(sys.executable).with_name("forge")
    is_ours = ours.exists() and ours.resolve() == Path(found).resolve()
    return None if is_ours else Path(found)


def warn_of_foreign_forge() -> None:
    if other := foreign_forge():
        report.warning(
            f"the `forge` on your PATH is another program: {other}. "
            f"Use {Path(sys.executable).with_name('forge')} or `python -m forge`."
        )
