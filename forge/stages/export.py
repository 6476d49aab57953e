"""The stage *export*: base and adapter to GGUF."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge import report, worker
from forge.export.run import ADAPTER_FILE
from forge.model.estimate import export_disk
from forge.resolve.derived import largest_type, quant_asked
from forge.resolve.resolved import Resolved
from forge.resolve.rows import certificate_rows, certificate_rows_are
from forge.resolve.stage import GgufStage
from forge.stages.calibrate import CALIBRATION_STAGE, importance_in
from forge.stages.train import ADAPTER_STAGE
from forge.store.artifacts import Artifact
from forge.store.digest import Json
from forge.tools.llama_cpp import find_converters


def adapter_in(export: Artifact) -> Path | None:
    """The adapter's own GGUF, where *export* made one: what is served is then two files."""
    path = export.path / ADAPTER_FILE
    return path if path.is_file() else None


class ExportStage(GgufStage):
    """One GGUF in one pass, with the token ids proved before."""

    name = "export"
    version = 6

    def __init__(self, ship: Resolved) -> None:
        super().__init__(ship)
        adapted = (ADAPTER_STAGE,) if ship.recipe.train is not None else ()
        calibrated = (CALIBRATION_STAGE,) if ship.recipe.export.is_calibrated else ()
        self.needs = (("data",) if ship.recipe.data else ()) + adapted + calibrated

    def params(self) -> Mapping[str, Json]:
        export = self.ship.recipe.export
        return {
            "name": self.ship.recipe.name,
            "base": self.ship.base_digest,
            "base.tokenizer": self.ship.tokenizer_digest,
            "export.mode": export.mode,
            "export.quant": quant_asked(self.ship),
            "export.merge_base": export.merge_base,
            "export.keep_merged": export.keep_merged,
            "chat template": self.ship.template_digest,
        }

    def bytes_needed(self, inputs: Mapping[str, Artifact]) -> int:
        """The GGUF, and the merged checkpoint (float32 where the adapter touches it) if it is kept.

        An adapter of its own is written twice, in float32.
        """
        export = self.ship.recipe.export
        needed = export_disk(self.ship.parameters, largest_type(self.ship), keep_merged=export.keep_merged)
        beside = export.mode != "merged" and ADAPTER_STAGE in inputs
        of_adapter = sum(one.bytes for one in inputs[ADAPTER_STAGE].outputs.values()) if beside else 0
        return needed.total + 2 * of_adapter

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        export, measured = self.ship.recipe.export, self._measured_base(inputs, out)
        merge_base = measured["chosen"] if measured else export.merge_base
        within = export.max_kl is not None
        arguments = {
            "base": str(self.ship.base_directory),
            "adapter": str(inputs[ADAPTER_STAGE].path) if ADAPTER_STAGE in inputs else None,
            "tokenizer": str(self.ship.tokenizer.directory),
            "chat_template": self.ship.template.pinned_source(),
            "data": str(inputs["data"].path) if "data" in inputs else None,
            "out": str(out),
            "converters": str(find_converters(self.ship.store.root)),
            "settings": {
                "name": self.ship.recipe.name,
                "quant": inputs[CALIBRATION_STAGE].facts["quant"] if within else export.quant,
                "importance": importance_in(inputs),
                "keep_merged": export.keep_merged,
                "mode": export.mode,
                "merge_base": merge_base,
                "threads": None,
                "end_of_turn_id": self.ship.prompt_format.end_of_turn_id,
            },
        }
        try:
            facts = worker.call("export", arguments, log=self.ship.log)
        except BaseException:
            # Nothing of it can be gone on with, and it may be as large as the model.
            shutil.rmtree(out / "work", ignore_errors=True)
            raise
        if measured:
            placed = "merged into" if facts["mode"] == "merged" else "the adapter is on"
            report.info(f"{placed} the {merge_base} base: {measured['why']}")
        return facts | {"merge_base": merge_base, "merge_base_measured": measured}

    def _measured_base(self, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any] | None:
        """What the held-out rows say of the two bases, where the recipe asks for it."""
        if self.ship.recipe.export.merge_base != "measured":
            return None
        work = out / "work"
        work.mkdir(exist_ok=True)
        arguments = {
            "base": str(self.ship.base_directory),
            "adapter": str(inputs[ADAPTER_STAGE].path),
            "rows": str(certificate_rows(self.ship, inputs, work)),
            "rows_are": certificate_rows_are(inputs),
            "trust_remote_code": self.ship.runs_own_code,
        }
        return worker.call("choose_base", arguments, log=self.ship.log)
