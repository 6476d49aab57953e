"""The runtimes by name. Each is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import cast

from forge.errors import RecipeError
from forge.serve.runtime import Runtime, ServerSettings
from forge.tools.hosts import DEFAULT_HOST

# name -> module and function.
RUNTIMES: Mapping[str, tuple[str, str]] = {
    "embedded": ("forge.serve.embedded", "serve_embedded"),
    "llama-server": ("forge.serve.llama_server", "serve_llama_server"),
    "container": ("forge.serve.container", "serve_container"),
    "ollama": ("forge.serve.ollama", "serve_ollama"),
}
# ServerSettings that only one runtime understands.
_OWN = {"program": "llama-server", "image": "container"}


def runtime_for(name: str) -> Runtime:
    """The runtime called `name`; raises `RecipeError` for a name that there is not."""
    if name not in RUNTIMES:
        raise RecipeError(f"there is no runtime {name}", hint="known are " + ", ".join(RUNTIMES))
    module, function = RUNTIMES[name]
    return cast(Runtime, getattr(importlib.import_module(module), function))


def check_runtime(name: str, *, host: str = DEFAULT_HOST, port: int = 0) -> None:
    """Raise `MissingToolError` when the runtime called `name` cannot run here, or Ollama not there.

    The others say so when they start.
    """
    if name == "embedded":
        from forge.tools import xllamacpp

        xllamacpp.check_processor()
    elif name == "ollama":
        from forge.tools import ollama, ollama_server

        ollama_server.check_ollama(ollama.server_url(ollama.address_of(host, port)))


def refuse_foreign(name: str, settings: ServerSettings) -> None:
    """Raise `RecipeError` for a setting that belongs to another runtime than `name`."""
    for field, owner in _OWN.items():
        if getattr(settings, field) is not None and owner != name:
            raise RecipeError(
                f"the runtime {name} has no {field} to choose", hint=f"that goes with --runtime {owner}"
            )
