"""The pure stages around the adapter: *train* (here or adopted), *validate*, *evaluate*."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge import worker
from forge.adapter.read import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from forge.adapter.tokenizer import copy_tokenizer
from forge.adapter.vocabulary import saved_whole
from forge.errors import CheckError, DataError, ForgeError
from forge.model.estimate import lora_parameters
from forge.recipe.schema import Train
from forge.stages.artifacts import ADAPTER_STAGE, ShipStage, installed
from forge.store.artifacts import Artifact
from forge.store.digest import Json

_STACK = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
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
        return {name: installed(name) for name in _STACK}

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


class AdoptStage(ShipStage):
    """An adapter that another tool made, checked and taken into the store."""

    name = ADAPTER_STAGE
    version = 2

    def params(self) -> Mapping[str, Json]:
        return {"train.from": self.ship.adapter_digest, "base": self.ship.base_digest}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        adopted = self.ship.adopted
        assert adopted is not None
        if adopted.directory is None:
            raise DataError(f"train.from: {adopted.spec} is not here", hint="run without --offline")
        adapter = read_adapter(adopted.directory)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(adopted.directory / name, out / name)
        copy_tokenizer(adopted.directory, out)
        return {
            "adopted_from": adopted.spec,
            "revision": adopted.revision,
            "trained_on": adapter.base_name,
            "layers": len(adapter.layers),
        }


class ValidateStage(ShipStage):
    """peft's own status of the adapter on this base; a sound one only goes on."""

    name = "validate"
    version = 3
    needs = (ADAPTER_STAGE,)

    def params(self) -> Mapping[str, Json]:
        return {"base": self.ship.base_digest}

    def tools(self) -> Mapping[str, str]:
        return {"peft": installed("peft")}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        arguments = {
            "base": str(self.ship.base_directory),
            "adapter": str(inputs[ADAPTER_STAGE].path),
            "trust_remote_code": self.ship.runs_own_code,
        }
        return worker.call("validate", arguments, log=self.ship.log)


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
        return {name: installed(name) for name in _STACK}

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
            from forge import report

            report.warning(message)
            return None
        return CheckError(
            message,
            hint="train longer or with a higher learning rate, look at the data's first row in the report; "
            "verify.learned: warn ships it all the same",
        )


def _has_improved(facts: Mapping[str, Any]) -> bool:
    return bool(facts["loss"]["after"] < facts["loss"]["before"])
