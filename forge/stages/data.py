"""The stage *data*: rows to ids and loss mask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.chat.stops import require
from forge.data.prepare import TRAIN_FILE, Settings, prepare
from forge.resolve.derived import prompt_params
from forge.resolve.stage import ShipStage
from forge.store.artifacts import Artifact
from forge.store.digest import Json


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
