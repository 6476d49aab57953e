"""The stage *validate*: is the adapter sound on this base?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from forge import worker
from forge.adapter.status import Validated, ValidateRequest, validate_adapter
from forge.codec import Json
from forge.resolve.stage import ShipStage, installed
from forge.stages.train import ADAPTER_STAGE
from forge.store.artifacts import Artifact


class ValidateStage(ShipStage):
    """peft's own status of the adapter on this base; a sound one only goes on."""

    name = "validate"
    version = 4
    needs = (ADAPTER_STAGE,)

    def params(self) -> Mapping[str, Json]:
        return {"base": self.ship.base_digest}

    def packages(self) -> Collection[str]:
        return ("torch", "transformers", "peft", "safetensors")

    def tools(self) -> Mapping[str, str]:
        return {"peft": installed("peft")}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Validated:
        request = ValidateRequest(
            self.ship.base_directory, inputs[ADAPTER_STAGE].path, self.ship.runs_own_code
        )
        return worker.perform(validate_adapter, request, log=self.ship.log)
