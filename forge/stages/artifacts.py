"""The pure stages at both ends of training: *data* before it, *export* after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from forge import report, worker
from forge.chat.stops import require
from forge.data.prepare import TRAIN_FILE, Settings, prepare
from forge.export.run import ADAPTER_FILE
from forge.model.estimate import export_disk
from forge.pipeline.stage import Stage
from forge.recipe.quants import BUDGETED
from forge.stages.rows import certificate_rows, certificate_rows_are
from forge.stages.ship import Ship
from forge.store.artifacts import Artifact
from forge.store.digest import Json
from forge.tools.llama_cpp import LLAMA_CPP_COMMIT, find_converters
from forge.verify.calibrate import IMPORTANCE_FILE

ADAPTER_STAGE = "train"
CALIBRATION_STAGE = "calibrate"


def gguf_name(ship: Ship, exported: Mapping[str, Any]) -> str:
    """What the GGUF is called in the run; `exported` are the facts of the stage *export*."""
    return f"{ship.recipe.name}-{exported['quant']}.gguf"


def adapter_in(export: Artifact) -> Path | None:
    """The adapter's own GGUF, where *export* made one: what is served is then two files."""
    path = export.path / ADAPTER_FILE
    return path if path.is_file() else None


def prompt_params(ship: Ship) -> dict[str, Json]:
    """What a rendered prompt and its ids depend on."""
    training = ship.training
    return {
        "base.tokenizer": ship.tokenizer_digest,
        "train.template_variables": dict(training.template_variables) if training else {},
    }


def quant_asked(ship: Ship) -> str:
    """The type in a stage's request; one that a budget chose is known by *calibrate*'s digest."""
    quant = ship.recipe.export.quant
    return quant if isinstance(quant, str) else "within a budget"


def largest_type(ship: Ship) -> str:
    """The type, or the largest that a budget may choose: what there must be room for."""
    quant = ship.recipe.export.quant
    return quant if isinstance(quant, str) else BUDGETED[0]


def importance_in(inputs: Mapping[str, Artifact]) -> str | None:
    """The importance matrix that the file is rounded by."""
    return str(inputs[CALIBRATION_STAGE].path / IMPORTANCE_FILE) if CALIBRATION_STAGE in inputs else None


class ShipStage(Stage):
    """A pure stage of one ship."""

    def __init__(self, ship: Ship) -> None:
        self.ship = ship


class GgufStage(ShipStage):
    """A stage that writes or measures a GGUF: llama.cpp's versions count, those of torch are noted."""

    def tools(self) -> Mapping[str, str]:
        return {"llama-cpp-python": installed("llama-cpp-python"), "llama.cpp converters": LLAMA_CPP_COMMIT}

    def recorded(self) -> Mapping[str, str]:
        return {name: installed(name) for name in ("torch", "transformers")}


class DataStage(ShipStage):
    """Rows to ids and loss mask; every problem of the data is told here, before anything long."""

    name = "data"
    version = 1

    def params(self) -> Mapping[str, Json]:
        data, training = self.ship.recipe.data, self.ship.training
        assert data is not None
        heldout = self.ship.heldout
        columns = data.columns.model_dump(exclude_none=True)
        return {
            "data.source": self.ship.file_digest(self.ship.data_files),
            "data.eval": self.ship.file_digest([heldout]) if isinstance(heldout, Path) else heldout,
            "data.format": data.format,
            "data.columns": columns,
            "data.seed": None if isinstance(heldout, Path) else data.seed,
            "data.limit": data.limit,
            "data.overlong": data.overlong,
            "train.max_length": training.max_length if training else None,
            "train.supervise": training.supervise if training else "all",
            **prompt_params(self.ship),
        }

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        data = self.ship.recipe.data
        assert data is not None
        settings = self.settings()
        facts = prepare(settings, self.ship.prompt_format, self.ship.configuration.max_positions, out)
        with (out / TRAIN_FILE).open(encoding="utf-8") as rows:
            broken = self.ship.stops.in_mask(
                map(json.loads, rows),
                may_be_cut=data.overlong == "truncate",
                every_turn=settings.supervise == "all",
            )
            require(broken)
        return facts

    def settings(self) -> Settings:
        """What the recipe says of the data."""
        data, training = self.ship.recipe.data, self.ship.training
        assert data is not None
        return Settings(
            source=self.ship.data_files,
            heldout=self.ship.heldout,
            format=data.format,
            columns=data.columns.model_dump(exclude_none=True),
            seed=data.seed,
            limit=data.limit,
            overlong=data.overlong,
            max_length=training.max_length if training else None,
            supervise=training.supervise if training else "all",
        )


class ExportStage(GgufStage):
    """One GGUF in one pass, with the token ids proved before."""

    name = "export"
    version = 6

    def __init__(self, ship: Ship) -> None:
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


def installed(package: str) -> str:
    """The version of an installed package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
