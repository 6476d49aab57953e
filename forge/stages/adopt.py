"""The stage *train* of a recipe that names an adapter: one of another tool, taken into the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.adapter.adopt import copy_adapter
from forge.adapter.read import read_adapter
from forge.adapter.tokenizer import copy_tokenizer
from forge.errors import DataError
from forge.stages.train import AdapterStage
from forge.store.artifacts import Artifact
from forge.store.digest import Json


class AdoptStage(AdapterStage):
    """An adapter that another tool made, checked and taken into the store."""

    version = 3

    def params(self) -> Mapping[str, Json]:
        return {"train.from": self.ship.adapter_digest, "base": self.ship.base_digest}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        adopted = self.ship.adopted
        assert adopted is not None
        if adopted.directory is None:
            raise DataError(f"train.from: {adopted.spec} is not here", hint="run without --offline")
        adapter = read_adapter(adopted.directory)
        renamed = copy_adapter(adopted.directory, out)
        copy_tokenizer(adopted.directory, out)
        return {
            "adopted_from": adopted.spec,
            "revision": adopted.revision,
            "trained_on": adapter.base_name,
            "layers": len(adapter.layers),
            "names_unwrapped": renamed,
        }
