"""Is every tool there that the stages to come need? Asked before anything runs.

An hour of training must not end at a missing converter. Not covered: whether the tools work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping
from functools import partial

from forge.errors import MissingToolError, Problem
from forge.recipe.schema import Train
from forge.resolve.resolved import Resolved
from forge.serve.runtimes import check_runtime
from forge.tools.llama_cpp import find_converters

_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "train": ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors"),
    "validate": ("torch", "transformers", "peft", "safetensors"),
    "evaluate": ("torch", "transformers", "peft"),
    "calibrate": ("torch", "transformers", "safetensors", "llama_cpp", "gguf"),
    "export": ("torch", "transformers", "safetensors", "llama_cpp"),
    "verify": ("torch", "transformers", "accelerate", "safetensors", "llama_cpp", "gguf"),
}
_INSTALL = "install the training stack: pip install 'forge-ship[train]'"


def require_tools(ship: Resolved, stages: Collection[str]) -> None:
    """Raise `MissingToolError` with everything that `stages` (those that will really run) lack."""
    needed = {name for stage in stages for name in _PACKAGES.get(stage, ())}
    train, deploy = ship.recipe.train, ship.recipe.deploy
    if not isinstance(train, Train):
        needed -= {"trl", "datasets"}  # an adapter that was made elsewhere
    elif "train" in stages and train.method == "qlora":
        needed.add("bitsandbytes")
    absent = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    problems = [Problem(f"the Python package {name} is not installed") for name in absent]
    hints = [_INSTALL] if absent else []
    checks: dict[str, Callable[[], object]] = {
        "calibrate": partial(find_converters, ship.store.root),
        "export": partial(find_converters, ship.store.root),
        "verify": partial(find_converters, ship.store.root),
        "deploy": partial(check_runtime, deploy.runtime, host=deploy.host, port=deploy.port),
    }
    for stage, check in checks.items():
        try:
            if stage in stages:
                check()
        except MissingToolError as missing:
            problems.append(Problem(missing.message))
            hints.append(missing.hint)
    problems, hints = (
        list(dict.fromkeys(problems)),
        list(dict.fromkeys(hints)),
    )  # two stages may need one tool
    if problems:
        message = problems[0].message if len(problems) == 1 else f"{len(problems)} tools are missing"
        raise MissingToolError(message, hint="; ".join(hints), problems=problems)
