"""Is every tool there that the stages to come need? Asked before anything runs.

An hour of training must not end at a missing converter. Not covered: whether the tools work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial

from forge.errors import MissingToolError, Problem, require_each
from forge.pipeline.stage import Step


def require_tools(stages: Sequence[Step]) -> None:
    """Raise `MissingToolError` with everything that `stages` (those that will really run) lack."""
    require_each([partial(_require_packages, stages), *(stage.require_tools for stage in stages)])


def _require_packages(stages: Sequence[Step]) -> None:
    needed = {name for stage in stages for name in stage.packages()}
    absent = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if absent:
        raise MissingToolError(
            f"{len(absent)} Python packages are not installed",
            hint="install the training stack: pip install 'forge-ship[train]'",
            problems=[Problem(f"the Python package {name} is not installed") for name in absent],
        )
