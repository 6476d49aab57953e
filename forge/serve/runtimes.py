"""The runtimes by their names in a recipe, and what each needs of this machine.

A table, so that a new one is a line here. Nothing is imported before it is asked for: a plan loads
none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from forge.errors import RecipeError
from forge.serve.runtime import Runtime


@dataclass(frozen=True)
class _Entry:
    """`load` gives the runtime; `check` raises `MissingToolError` where it cannot run here."""

    load: Callable[[], Runtime]
    check: Callable[[], None]


def runtime_for(name: str) -> Runtime:
    """The runtime called `name`; raises `RecipeError` when there is none."""
    return _entry(name).load()


def check_runtime(name: str) -> None:
    """Raise `MissingToolError` when the runtime called `name` cannot run here; asked before a ship runs."""
    _entry(name).check()


def _entry(name: str) -> _Entry:
    if name not in RUNTIMES:
        raise RecipeError(f"there is no runtime {name}", hint=f"one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def _embedded() -> Runtime:
    from forge.serve.embedded import serve_embedded

    return serve_embedded


def _check_embedded() -> None:
    from forge.tools import xllamacpp

    xllamacpp.check()


def _ollama() -> Runtime:
    from forge.serve.ollama import serve_ollama

    return serve_ollama


def _check_ollama() -> None:
    from forge.tools import ollama_server

    ollama_server.check()


RUNTIMES: Mapping[str, _Entry] = {
    "embedded": _Entry(_embedded, _check_embedded),
    "ollama": _Entry(_ollama, _check_ollama),
}
