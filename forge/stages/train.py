"""The stage *train*: a LoRA adapter, trained in a worker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge import worker
from forge.adapter.vocabulary import saved_whole
from forge.model.estimate import lora_parameters
from forge.recipe.schema import Train
from forge.resolve.stage import ShipStage, installed
from forge.store.artifacts import Artifact
from forge.store.digest import Json

ADAPTER_STAGE = "train"
TRAINING_STACK = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
# Fields of `train` that change no byte of the adapter, or do so through the data stage alone.
_NOT_KEYED = {"checkpoint_minutes", "report_to", "max_length", "supervise", "template_variables"}


class TrainStage(ShipStage):
    """A LoRA adapter, trained in a worker; resumable."""

    name = ADAPTER_STAGE
    version = 1
    needs = ("data",)

    @property
    def _train(self) -> Train:
        assert self.ship.training is not None
        return self.ship.training

    def params(self) -> Mapping[str, Json]:
        fields: dict[str, Json] = {}
        for name, value in self._train.model_dump(mode="json", exclude=_NOT_KEYED).items():
            if name == "lora":
                fields |= {f"train.lora.{key}": one for key, one in value.items()}
            else:
                fields[f"train.{name}"] = value
        # The tokenizer's files are part of the adapter.
        return {"base": self.ship.base_digest, "base.tokenizer": self.ship.tokenizer_digest, **fields}

    def recorded(self) -> Mapping[str, str]:
        return {name: installed(name) for name in TRAINING_STACK}

    def bytes_needed(self, inputs: Mapping[str, Artifact]) -> int:
        """The adapter, and two checkpoints with Adam's two moments, all in float32."""
        return self.bytes_kept() * (1 + 2 * 3)

    def bytes_kept(self) -> int:
        """The adapter of every matrix and what is saved whole, in float32: the most that it can be."""
        lora = self._train.lora
        matrices = [spec for spec in self.ship.tensors.values() if len(spec.shape) == 2]
        factors = lora_parameters(matrices, lora.r, dora=lora.dora)
        return 4 * (factors + saved_whole(self.ship.tensors, lora.modules_to_save))

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        settings = self._train.model_dump(mode="json") | {
            "trust_remote_code": self.ship.runs_own_code,
            "max_length": inputs["data"].facts["max_length"],
            "pad_token": self.ship.pad_token,
            "tokenizer": str(self.ship.tokenizer.directory),
        }
        arguments = {
            "base": str(self.ship.base_directory),
            "base_name": self.ship.base.spec,
            "base_revision": self.ship.base.revision,
            "data": str(inputs["data"].path),
            "out": str(out),
            "settings": settings,
        }
        return worker.call("train", arguments, log=self.ship.log)
