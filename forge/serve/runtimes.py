"""The runtimes by name. Each is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import cast

from forge.errors import RecipeError
from forge.serve.runtime import Runtime, Settings

# name -> module and function.
RUNTIMES: Mapping[str, tuple[str, str]] = {
    "embedded": ("forge.serve.embedded", "serve_embedded"),
    "llama-server": ("forge.serve.llama_server", "serve_llama_server"),
    "container": ("forge.serve.container", "serve_container"),
    "ollama": ("forge.serve.ollama", "serve_ollama"),
}
# What says, before anything runs, whether one can run here; the others say so when they start.
_CHECKS = {"embedded": ("forge.tools.xllamacpp", "check"), "ollama": ("forge.tools.ollama_server", "check")}
# Settings that one runtime alone understands.
_OWN = {"program": "llama-server", "image": "container"}


def runtime_for(name: str) -> Runtime:
    """The runtime called `name`; raises `RecipeError` for a name that there is not."""
    if name not in RUNTIMES:
        raise RecipeError(f"there is no runtime {name}", hint="known are " + ", ".join(RUNTIMES))
    module, function = RUNTIMES[name]
    return cast(Runtime, getattr(importlib.import_module(module), function))


def check_runtime(name: str) -> None:
    """Raise `MissingToolError` when the runtime called `name` cannot run here."""
    if name in _CHECKS:
        module, function = _CHECKS[name]
        getattr(importlib.import_module(module), function)()


def refuse_foreign(name: str, settings: Settings) -> None:
    """Raise `RecipeError` for a setting that belongs to another runtime than `name`."""
    for field, owner in _OWN.items():
        if getattr(settings, field) is not None and owner != name:
            raise RecipeError(
                f"the runtime {name} has no {field} to choose", hint=f"that goes with --runtime {owner}"
            )
