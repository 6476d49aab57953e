"""The stage *evaluate*: what was learned, on rows that were held out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge import report, worker
from forge.errors import CheckError, ForgeError
from forge.resolve.stage import ShipStage, installed
from forge.stages.train import ADAPTER_STAGE, TRAINING_STACK
from forge.store.artifacts import Artifact
from forge.store.digest import Json


class EvaluateStage(ShipStage):
    """Held-out loss and answers of base and tuned model; judged afresh on every run."""

    name = "evaluate"
    version = 2
    needs = ("data", ADAPTER_STAGE)

    def params(self) -> Mapping[str, Json]:
        training = self.ship.training
        return {
            "base": self.ship.base_digest,
            "train.method": training.method if training else None,
            "train.device": training.device if training else "auto",
            "train.dtype": training.dtype if training else "auto",
        }

    def recorded(self) -> Mapping[str, str]:
        return {name: installed(name) for name in TRAINING_STACK}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        training = self.ship.training
        settings = {
            "device": training.device if training else "auto",
            "dtype": training.dtype if training else "auto",
            "quantize": bool(training and training.method == "qlora"),
            "trust_remote_code": self.ship.runs_own_code,
            "seed": training.seed if training else 0,
            "end_of_turn_id": self.ship.prompt_format.end_of_turn_id,
            "pad_token_id": self.ship.pad_token_id,
            "tokenizer": str(self.ship.tokenizer.directory),
        }
        arguments = {
            "base": str(self.ship.base_directory),
            "adapter": str(inputs[ADAPTER_STAGE].path),
            "data": str(inputs["data"].path),
            "settings": settings,
        }
        return worker.call("evaluate", arguments, log=self.ship.log)

    def judge(self, artifact: Artifact) -> ForgeError | None:
        wanted = self.ship.recipe.verify.learned
        if wanted == "off" or _has_improved(artifact.facts):
            return None
        loss = artifact.facts["loss"]
        message = (
            f"nothing was learned: the held-out loss is {loss['after']:.4f} after training, "
            f"{loss['before']:.4f} before"
        )
        if wanted == "warn":
            report.warning(message)
            return None
        return CheckError(
            message,
            hint="train longer or with a higher learning rate, look at the data's first row in the report; "
            "verify.learned: warn ships it all the same",
        )


def _has_improved(facts: Mapping[str, Any]) -> bool:
    return bool(facts["loss"]["after"] < facts["loss"]["before"])
