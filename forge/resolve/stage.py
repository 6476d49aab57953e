"""What the pure stages of a recipe have in common: the resolved recipe, and whose versions count."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from forge.pipeline.stage import Stage
from forge.resolve.resolved import Resolved
from forge.tools.llama_cpp import LLAMA_CPP_COMMIT


class ShipStage(Stage):
    """A pure stage of one ship."""

    def __init__(self, ship: Resolved) -> None:
        self.ship = ship


class GgufStage(ShipStage):
    """A stage that writes or measures a GGUF: llama.cpp's versions count, those of torch are noted."""

    def tools(self) -> Mapping[str, str]:
        return {"llama-cpp-python": installed("llama-cpp-python"), "llama.cpp converters": LLAMA_CPP_COMMIT}

    def recorded(self) -> Mapping[str, str]:
        return {name: installed(name) for name in ("torch", "transformers")}


def installed(package: str) -> str:
    """The version of an installed package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
