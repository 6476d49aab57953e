"""*calibrate*: an importance matrix of the training rows, and the type that a budget allows.

A stage where the recipe asks for one of the two: *export* and *verify* then take the matrix.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from forge import report, worker
from forge.codec import Json
from forge.data.prepare import TRAIN_FILE
from forge.errors import CheckError, ForgeError
from forge.model.estimate import certificate_disk
from forge.pipeline.stage import Result
from forge.recipe.quants import BUDGETED
from forge.resolve.derived import merge_base, name_inside
from forge.resolve.resolved import Resolved
from forge.resolve.rows import measured_file
from forge.resolve.stage import GgufStage
from forge.runs.files import CALIBRATION
from forge.runs.publish import publish_output
from forge.stages.data import DATA_STAGE
from forge.stages.train import ADAPTER_STAGE, adapter_of
from forge.store.artifacts import Artifact
from forge.verify.calibrate import IMPORTANCE_FILE, calibrate
from forge.verify.calibration import Calibrated, CalibrationRequest

CALIBRATION_STAGE = "calibrate"


def importance_in(inputs: Mapping[str, Artifact]) -> Path | None:
    """The importance matrix that the file is rounded by."""
    return inputs[CALIBRATION_STAGE].path / IMPORTANCE_FILE if CALIBRATION_STAGE in inputs else None


def quant_chosen(inputs: Mapping[str, Artifact]) -> str:
    """The type that the search chose; it judged that there is one."""
    search = Calibrated.of_facts(inputs[CALIBRATION_STAGE].facts).search
    assert search is not None
    assert search.quant is not None
    return search.quant


def withdraw(run: Path) -> None:
    """Take away the matrix of an earlier ship of `run`, which the new file was not rounded by."""
    shutil.rmtree(run / CALIBRATION, ignore_errors=True)


class CalibrateStage(GgufStage):
    """Measures the types; that one of them is within the budget is judged on every run."""

    name = CALIBRATION_STAGE
    rank = 60
    version = 3

    def __init__(self, ship: Resolved) -> None:
        super().__init__(ship)
        self.needs = (DATA_STAGE, *((ADAPTER_STAGE,) if ship.recipe.train is not None else ()))

    def params(self) -> Mapping[str, Json]:
        export = self.ship.recipe.export
        return {
            "base": self.ship.base_digest,
            "base.tokenizer": self.ship.tokenizer_digest,
            "export.quant.max_kl": export.max_kl,
            "export.merge_base": merge_base(self.ship),
            "chat template": self.ship.template_digest,
        }

    def packages(self) -> Collection[str]:
        return ("torch", "transformers", "safetensors", "llama_cpp", "gguf")

    def bytes_beside(self) -> Mapping[str, int]:
        """An F16 file and, with a budget, the type that is being tried."""
        tried = "f16" if self.ship.recipe.export.max_kl is None else BUDGETED[0]
        return {"files to try types on": certificate_disk(self.ship.parameters, tried).total}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Mapping[str, object]:
        data, max_kl = inputs[DATA_STAGE], self.ship.recipe.export.max_kl
        request = CalibrationRequest(
            self.ingredients(adapter_of(inputs), "nf4" if merge_base(self.ship) == "nf4" else "original"),
            rows=data.path / TRAIN_FILE,
            measured_rows=data.path / measured_file(data),
            out=out,
            name=name_inside(self.ship),
            types=() if max_kl is None else tuple(BUDGETED),
            max_kl=max_kl,
        )
        return worker.perform(calibrate, request, log=self.ship.log).facts()

    def publish(self, artifact: Artifact, run: Path, published: str | None) -> None:
        publish_output(artifact, IMPORTANCE_FILE, run / CALIBRATION / IMPORTANCE_FILE, published)

    def summary(self, result: Result, run: Path) -> Mapping[str, object]:
        return {"calibration": dict(result.facts)}

    def judge(self, artifact: Artifact) -> ForgeError | None:
        calibrated = Calibrated.of_facts(artifact.facts)
        show_search(calibrated)
        return failure_of_search(calibrated)


def show_search(calibrated: Calibrated) -> None:
    """Show the types that were measured and the one that was chosen, where there is a budget."""
    search = calibrated.search
    if search is None:
        return
    columns = ("type", "size", "KL mean", "KL max", "top-1", "perplexity", "tokens/s", "")
    rows = [
        (
            row.quant,
            f"{row.bytes / 1e6:.1f} MB",
            f"{row.kl_mean:.2g}",
            f"{row.kl_max:.2g}",
            f"{row.top1:.2%}",
            f"{row.perplexity:.4f}",
            f"{row.tokens_per_second:.1f}",
            "chosen" if row.quant == search.quant else "",
        )
        for row in (search.f16, *search.types)
    ]
    report.table(f"types, for a KL of at most {search.max_kl:g}", columns, rows)
    for reason in dict.fromkeys(search.left_out.values()):
        kinds = [kind for kind, why in search.left_out.items() if why == reason]
        report.info(f"left out: {', '.join(kinds)}: {reason}")
    for warning in search.warnings:
        report.warning(warning)


def failure_of_search(calibrated: Calibrated) -> CheckError | None:
    """The error of a budget that no type meets, with the table; None for a good one."""
    search = calibrated.search
    if search is None or search.quant:
        return None
    best = min(search.types, key=lambda row: row.kl_mean)
    failure = CheckError(
        f"no type is within a KL of {search.max_kl:g}: the best of them, {best.quant}, has "
        f"{best.kl_mean:.2g}",
        hint="raise export.quant.max_kl, or export f16",
    )
    failure.fields = {"calibration": calibrated.facts()}
    return failure
