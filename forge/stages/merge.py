"""The stage *merge*: the merged checkpoint of a recipe that makes no GGUF (`export: none`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from forge import report, worker
from forge.codec import Json
from forge.export.checkpoint import Merged, MergeRequest
from forge.export.checkpoint import merge as make_checkpoint
from forge.export.run import MERGED_DIRECTORY
from forge.pipeline.stage import Result
from forge.resolve.derived import merge_base, sampling_params
from forge.resolve.stage import ShipStage
from forge.stages.train import ADAPTER_STAGE
from forge.store.artifacts import Artifact
from forge.store.runs import publish


class MergeStage(ShipStage):
    """Base and adapter as one checkpoint, for transformers and vLLM."""

    name = "merge"
    rank = 70
    version = 2
    needs = (ADAPTER_STAGE,)

    def params(self) -> Mapping[str, Json]:
        return {
            "base": self.ship.base_digest,
            "base.tokenizer": self.ship.tokenizer_digest,
            "export.merge_base": merge_base(self.ship),
            "chat template": self.ship.template_digest,
            **sampling_params(self.ship),
        }

    def packages(self) -> Collection[str]:
        return ("torch", "safetensors")

    def bytes_kept(self) -> Mapping[str, int]:
        """Float32 where the adapter touches it: the most that it can be."""
        return {"merged checkpoint": 4 * self.ship.parameters}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Merged:
        request = MergeRequest(
            base=self.ship.base_directory,
            adapter=inputs[ADAPTER_STAGE].path,
            tokenizer=self.ship.tokenizer.directory,
            chat_template=self.ship.template.pinned_source(),
            out=out,
            merge_base="nf4" if merge_base(self.ship) == "nf4" else "original",
            sampling=self.ship.recipe.model.sampling.asked(),
        )
        return worker.perform(make_checkpoint, request, log=self.ship.log)

    def publish(self, artifact: Artifact, run: Path, published: str | None) -> None:
        for old in run.glob("*.gguf"):
            old.unlink()  # of an earlier recipe of this run
        publish(artifact.path / MERGED_DIRECTORY, run / MERGED_DIRECTORY)

    def summary(self, result: Result, run: Path) -> Mapping[str, object]:
        report.info(
            f"merged, without a GGUF and without a certificate (export: none): {run / MERGED_DIRECTORY}, for "
            "transformers and vLLM"
        )
        return {"merged": str(run / MERGED_DIRECTORY)}
