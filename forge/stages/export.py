"""The stage *export*: base and adapter to GGUF."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from forge import report, worker
from forge.codec import Json
from forge.errors import ForgeError
from forge.export.cost import cost_of
from forge.export.request import Exported, ExportRequest, MergeBase
from forge.export.run import ADAPTER_FILE, GGUF_FILE, MERGED_DIRECTORY, export_gguf
from forge.model.estimate import export_disk
from forge.model.gguf_header import read_gguf
from forge.pipeline.stage import Result
from forge.resolve.derived import (
    gguf_name,
    keeps_merged,
    largest_type,
    merge_base,
    name_inside,
    quant_asked,
    quant_named,
    sampling_params,
)
from forge.resolve.resolved import Resolved
from forge.resolve.rows import certificate_rows, certificate_rows_are
from forge.resolve.stage import GgufStage, OfType
from forge.runs.files import BESIDE, adapter_beside, of_type, run_gguf
from forge.runs.publish import publish_output
from forge.stages.calibrate import CALIBRATION_STAGE, importance_in, quant_chosen, withdraw
from forge.stages.data import DATA_STAGE
from forge.stages.train import ADAPTER_STAGE, adapter_of
from forge.store.artifacts import Artifact
from forge.store.runs import publish
from forge.verify.bases import BasesRequest, ChosenBase, choose_base

EXPORT_STAGE = "export"
_WAS_TRAINED = "; an adapter that was trained through it was trained on other ids than it is served"


@dataclass(frozen=True)
class ExportFacts(Exported):
    """The file, and the base that the adapter was merged into, with the figures where it was measured."""

    merge_base: MergeBase
    merge_base_measured: ChosenBase | None


def adapter_in(export: Artifact) -> Path | None:
    """The adapter's own GGUF, where *export* made one: what is served is then two files."""
    path = export.path / ADAPTER_FILE
    return path if path.is_file() else None


class ExportStage(OfType, GgufStage):
    """One GGUF in one pass, with the token ids proved before."""

    name = EXPORT_STAGE
    rank = 70
    version = 8

    def __init__(self, ship: Resolved) -> None:
        super().__init__(ship)
        adapted = (ADAPTER_STAGE,) if ship.recipe.train is not None else ()
        calibrated = (CALIBRATION_STAGE,) if ship.recipe.export.is_calibrated else ()
        self.needs = ((DATA_STAGE,) if ship.recipe.data else ()) + adapted + calibrated

    def params(self) -> Mapping[str, Json]:
        export = self.ship.recipe.export
        return {
            "name": name_inside(self.ship),
            "base": self.ship.base_digest,
            "base.tokenizer": self.ship.tokenizer_digest,
            "export.mode": export.mode,
            "export.quant": quant_asked(self.ship),
            "export.merge_base": merge_base(self.ship),
            "export.keep_merged": keeps_merged(self.ship),
            "chat template": self.ship.template_digest,
            **sampling_params(self.ship),
        }

    def packages(self) -> Collection[str]:
        return ("torch", "transformers", "safetensors", "llama_cpp")

    def bytes_kept(self) -> Mapping[str, int]:
        """The GGUF, and the merged checkpoint (float32 where the adapter touches it) if it is kept."""
        parts = export_disk(
            self.ship.parameters, largest_type(self.ship), keep_merged=keeps_merged(self.ship)
        ).parts
        return {of_type(part, self.ship.further_type): size for part, size in parts.items()}

    def bytes_needed(self, inputs: Mapping[str, Artifact]) -> int:
        """An adapter of its own is written twice, in float32."""
        beside = self.ship.recipe.export.mode != "merged" and ADAPTER_STAGE in inputs
        of_adapter = sum(output.bytes for output in inputs[ADAPTER_STAGE].outputs.values()) if beside else 0
        return super().bytes_needed(inputs) + 2 * of_adapter

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> ExportFacts:
        export, measured = self.ship.recipe.export, self._measured_base(inputs, out)
        assert export.mode != "none"  # that recipe has no such stage
        asked = measured.chosen if measured else merge_base(self.ship)
        chosen: MergeBase = "nf4" if asked == "nf4" else "original"
        request = ExportRequest(
            self.ingredients(adapter_of(inputs), chosen),
            out=out,
            name=name_inside(self.ship),
            quant=quant_named(self.ship) or quant_chosen(inputs),
            mode=export.mode,
            data=inputs[DATA_STAGE].path if DATA_STAGE in inputs else None,
            importance=importance_in(inputs),
            keep_merged=keeps_merged(self.ship),
        )
        try:
            exported = worker.perform(export_gguf, request, log=self.ship.log)
        except BaseException:
            # Nothing of it can be gone on with, and it may be as large as the model.
            shutil.rmtree(out / "work", ignore_errors=True)
            raise
        if measured:
            placed = "merged into" if exported.mode == "merged" else "the adapter is on"
            report.info(f"{placed} the {chosen} base: {measured.why}")
        return ExportFacts(**vars(exported), merge_base=chosen, merge_base_measured=measured)

    def judge(self, artifact: Artifact) -> ForgeError | None:
        """Says what the type costs and saves on this model, and who would misread it; none is an error."""
        exported = artifact.read(ExportFacts)
        report.info(cost_of(read_gguf(artifact.path / GGUF_FILE), exported.quant))
        if exported.misread and not self.ship.further_type:
            say = report.warning if self.ship.adopted else report.info
            say(f"{exported.misread}{_WAS_TRAINED if self.ship.adopted else ''}")
        return None

    def publish(self, artifact: Artifact, run: Path, published: str | None) -> None:
        target = run / gguf_name(self.ship, artifact.read(ExportFacts).quant)
        if self.ship.further_type:
            _publish_gguf(target, artifact, published, set(run.glob("*.gguf")))
            return
        if CALIBRATION_STAGE not in self.needs:
            withdraw(run)
        # What lies beside a file that is new was made with the one before.
        kept = self._further_files(run) if published == artifact.digest else set()
        _publish_gguf(target, artifact, published, kept)
        if (artifact.path / MERGED_DIRECTORY).is_dir():
            publish(artifact.path / MERGED_DIRECTORY, run / MERGED_DIRECTORY)
        else:
            shutil.rmtree(run / MERGED_DIRECTORY, ignore_errors=True)  # an earlier ship's

    def summary(self, result: Result, run: Path) -> Mapping[str, object]:
        """The model's GGUF; its adapter's where it has one, or why it has none where it was to have one."""
        artifact = result.artifact
        assert artifact is not None
        if self.ship.further_type:
            return {}
        exported = artifact.read(ExportFacts)
        gguf = run / gguf_name(self.ship, exported.quant)
        adapter = {"adapter_gguf": str(adapter_beside(gguf))} if adapter_in(artifact) else {}
        reasons = list(exported.merged_because)
        return {"gguf": str(gguf), **adapter, **({"merged_because": reasons} if reasons else {})}

    def _further_files(self, run: Path) -> set[Path]:
        """The files of the recipe's further types."""
        models = [run / run_gguf(self.ship.recipe.name, quant) for quant in self.ship.recipe.export.types[1:]]
        return {*models, *map(adapter_beside, models)}

    def _measured_base(self, inputs: Mapping[str, Artifact], out: Path) -> ChosenBase | None:
        """What the held-out rows say of the two bases, where they are asked."""
        if merge_base(self.ship) != "measured":
            return None
        work = out / "work"
        work.mkdir(exist_ok=True)
        request = BasesRequest(
            self.ship.base_directory,
            inputs[ADAPTER_STAGE].path,
            certificate_rows(self.ship, inputs, work),
            certificate_rows_are(inputs),
            self.ship.runs_own_code,
        )
        return worker.perform(choose_base, request, log=self.ship.log)


def _publish_gguf(target: Path, artifact: Artifact, published: str | None, others: set[Path]) -> None:
    """The model as `target`, its adapter beside it; `others` stay, and no GGUF of an earlier recipe, which
    would mislead.

    Of two files the model comes last and the one before goes first: whenever this is killed, nobody finds
    a base without its adapter, or an adapter on a model that has it already.
    """
    adapter = {ADAPTER_FILE: adapter_beside(target)} if adapter_in(artifact) else {}
    kept = {*others, *adapter.values(), target}
    if published != artifact.digest and (adapter or adapter_beside(target).exists()):
        kept.discard(target)
    # The model goes before its adapter.
    for old in sorted(set(target.parent.glob("*.gguf")) - kept, key=lambda path: path.name.endswith(BESIDE)):
        old.unlink()
    for name, path in {**adapter, GGUF_FILE: target}.items():
        publish_output(artifact, name, path, published)
