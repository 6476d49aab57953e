"""Is every tool there that the stages to come need? Asked before anything runs.

An hour of training must not end at a missing converter. Not covered: whether the tools work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from forge.errors import MissingToolError, Problem
from forge.pipeline.stage import Step

_INSTALL = "install the training stack: pip install 'forge-ship[train]'"


def require_tools(stages: Sequence[Step]) -> None:
    """Raise `MissingToolError` with everything that `stages` (those that will really run) lack."""
    needed = {name for stage in stages for name in stage.packages()}
    absent = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    # Two stages may need one tool.
    problems = {Problem(f"the Python package {name} is not installed"): None for name in absent}
    hints = {_INSTALL: None} if absent else {}
    for stage in stages:
        try:
            stage.require_tools()
        except MissingToolError as missing:
            problems[Problem(missing.message)] = None
            hints[missing.hint] = None
    if problems:
        first = next(iter(problems))
        message = first.message if len(problems) == 1 else f"{len(problems)} tools are missing"
        raise MissingToolError(message, hint="; ".join(hints), problems=tuple(problems))
