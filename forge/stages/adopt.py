"""The stage *train* of a recipe that names an adapter: one of another tool, taken into the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forge.adapter.adopt import copy_adapter
from forge.adapter.read import read_adapter
from forge.adapter.tokenizer import copy_tokenizer
from forge.codec import Json
from forge.errors import DataError
from forge.stages.train import AdapterStage
from forge.store.artifacts import Artifact


@dataclass(frozen=True)
class AdoptedFacts:
    """Where the adapter is from; `names_unwrapped`: its tensors lost the prefix of a wrapper."""

    adopted_from: str
    revision: str | None
    trained_on: str | None
    layers: int
    names_unwrapped: bool


class AdoptStage(AdapterStage):
    """An adapter that another tool made, checked and taken into the store."""

    version = 3

    def params(self) -> Mapping[str, Json]:
        return {"train.from": self.ship.adapter_digest, "base": self.ship.base_digest}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> AdoptedFacts:
        adopted = self.ship.adopted
        assert adopted is not None
        if adopted.directory is None:
            raise DataError(f"train.from: {adopted.spec} is not here", hint="run without --offline")
        adapter = read_adapter(adopted.directory)
        renamed = copy_adapter(adopted.directory, out)
        copy_tokenizer(adopted.directory, out)
        return AdoptedFacts(adopted.spec, adopted.revision, adapter.base_name, len(adapter.layers), renamed)
