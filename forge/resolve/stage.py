"""What the pure stages of a recipe have in common: the resolved recipe, and whose versions count."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from forge.export.request import Ingredients, MergeBase
from forge.pipeline.stage import Stage
from forge.resolve.resolved import Resolved
from forge.runs.files import of_type
from forge.tools.llama_cpp import LLAMA_CPP_COMMIT, find_converters

NOT_INSTALLED = "not installed"


class OfShip:
    """A stage of one ship: it knows the resolved recipe, and its section lies beside its file."""

    def __init__(self, ship: Resolved) -> None:
        self.ship = ship

    def section(self) -> str:
        path = Path(inspect.getfile(type(self))).with_suffix(".html.jinja")
        return path.read_text(encoding="utf-8") if path.is_file() else ""


class ShipStage(OfShip, Stage):
    """A pure stage of one ship."""


class OfType(OfShip):
    """A stage about the file of one type; of a further type's its name says which.

    The report and the fields of the ship's JSON are the first type's.
    """

    name: str

    def __init__(self, ship: Resolved) -> None:
        super().__init__(ship)
        self.name = of_type(self.name, ship.further_type)

    @property
    def kind(self) -> str:
        return type(self).name

    def section(self) -> str:
        return "" if self.ship.further_type else super().section()


class GgufStage(ShipStage):
    """A stage that writes or measures a GGUF: llama.cpp's versions count, those of torch are noted."""

    def require_tools(self) -> None:
        find_converters(self.ship.store.root)

    def ingredients(self, adapter: Path | None, merge_base: MergeBase) -> Ingredients:
        """What this ship's GGUF is made of."""
        return Ingredients(
            base=self.ship.base_directory,
            adapter=adapter,
            tokenizer=self.ship.tokenizer.directory,
            chat_template=self.ship.template.pinned_source(),
            converters=find_converters(self.ship.store.root),
            end_of_turn_id=self.ship.prompt_format.end_of_turn_id,
            merge_base=merge_base,
            sampling=self.ship.recipe.model.sampling.asked(),
        )

    def tools(self) -> Mapping[str, str]:
        return {"llama-cpp-python": installed("llama-cpp-python"), "llama.cpp converters": LLAMA_CPP_COMMIT}

    def recorded(self) -> Mapping[str, str]:
        return {name: installed(name) for name in ("torch", "transformers")}


def installed(package: str) -> str:
    """The version of an installed package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
