"""The stage *data*: rows to ids and loss mask."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from forge import report
from forge.chat.stops import require
from forge.codec import Json
from forge.data.account import Account, Prepared, lines_of
from forge.data.conversations import LABELLED
from forge.data.exchange import PAIRS
from forge.data.prepare import TRAIN_FILE, Settings, look_at_data, prepare, read_all
from forge.data.reading import Source
from forge.recipe.schema import Data
from forge.resolve.derived import prompt_params
from forge.resolve.stage import ShipStage
from forge.store.artifacts import Artifact
from forge.train.arguments import warmup_steps

DATA_STAGE = "data"
_READ_BY_A_PLAN = 4_000_000  # bytes of rows: some 0.1 s

_SHOWN = 600  # characters of the first row
_BEFORE = 200  # of them before what carries loss, where it begins later


class DataStage(ShipStage):
    """Rows to ids and loss mask; every problem of the data is reported here, before anything long."""

    name = DATA_STAGE
    rank = 40
    version = 12

    def params(self) -> Mapping[str, Json]:
        data, training = self.ship.recipe.data, self.ship.training
        assert data is not None
        heldout = self.ship.heldout
        return {
            "data.source": self.ship.file_digest(self.ship.data_files),
            "data.eval": self.ship.file_digest([heldout]) if isinstance(heldout, Path) else heldout,
            **{name: list(values) for name, values in _of_sources(data, self.ship.sources).items()},
            "data.roles": dict(data.roles),
            "data.ignore": list(data.ignore),
            "data.encoding": data.encoding,
            "data.skip_bad_rows": data.skip_bad_rows,
            "data.seed": None if isinstance(heldout, Path) else data.seed,
            "data.limit": data.limit,
            "data.overlong": data.overlong,
            "train.max_length": training.max_length if training else None,
            "train.supervise": training.supervised if training else "all",
            "train.objective": training.objective if training else "sft",
            **prompt_params(self.ship),
        }

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Prepared:
        data = self.ship.recipe.data
        assert data is not None
        settings = self.settings()
        prepared = prepare(settings, self.ship.prompt_format, self.ship.configuration.max_positions, out)
        self._report(prepared)
        for answers in ("labels", "rejected_labels") if settings.pairs else ("labels",):
            with (out / TRAIN_FILE).open(encoding="utf-8") as rows:
                lines = report.track("check what ends an answer", rows, prepared.rows)
                broken = self.ship.stops.in_mask(
                    ({**row, "labels": row[answers]} for row in map(json.loads, lines) if answers in row),
                    may_be_cut=data.overlong == "truncate",
                    every_turn=settings.supervise == "all",
                )
                require(broken)
        return prepared

    def look(self) -> None:
        """Rows that a ship would refuse are refused by its plan, where reading them takes no time."""
        if not self.is_read_by_a_plan:
            if self.ship.data_files:
                report.info(
                    "rows: not read by a plan (over 4 MB, or pyarrow is missing): a ship begins with them"
                )
            return
        if self.ship.base.directory is None:
            read_all(self.settings())
        else:
            self._report(look_at_data(self.settings(), self.ship.prompt_format))

    @property
    def is_read_by_a_plan(self) -> bool:
        """Whether its files are here and small, and what reads them is installed."""
        ship = self.ship
        files = [*ship.data_files, *([ship.heldout] if isinstance(ship.heldout, Path) else [])]
        is_table = any(path.suffix.lower() in (".parquet", ".arrow") for path in files)
        is_small = sum(path.stat().st_size for path in files) < _READ_BY_A_PLAN
        return bool(ship.data_files) and is_small and not (is_table and find_spec("pyarrow") is None)

    def _report(self, account: Account) -> None:
        """What was read, how long that trains, and one row with what carries loss."""
        for line in lines_of(account):
            report.info(line)
        training = self.ship.training
        if training and training.batch_size != "auto" and training.processes:
            at_once = training.batch_size * training.gradient_accumulation * training.processes
            what, rows = "rows", account.rows
            limit = " at most, with packing" if training.packing else ""
            if training.objective == "kto":
                labelled = any(note.startswith(LABELLED) for note in account.notes)
                paired = any(note.startswith(PAIRS) for note in account.notes)
                what, rows = "answers", rows * 2 if paired else rows
                limit = " at most, each pair being two" if labelled and paired else limit
            whole = math.ceil(training.epochs * math.ceil(rows / at_once))
            steps = training.max_steps or whole
            if not limit:
                warmup_steps(training, steps)  # refuses as many as there are
            report.info(f"training: {steps:,} steps of {at_once} {what}{'' if training.max_steps else limit}")
        report.masked(_beginning(account.first_row.masked))

    def settings(self) -> Settings:
        """What the recipe says of the data."""
        data, training = self.ship.recipe.data, self.ship.training
        assert data is not None
        return Settings(
            sources=self.ship.sources,
            heldout=self.ship.heldout,
            seed=data.seed,
            limit=data.limit,
            overlong=data.overlong,
            max_length=training.max_length if training else None,
            supervise=training.supervised if training else "all",
            skip_bad_rows=data.skip_bad_rows,
        )


def _beginning(masked: str) -> str:
    """So much of a row that something of what carries loss is seen, however long its prompt is."""
    begins = masked.find("⟦")
    if begins < _SHOWN - _BEFORE:
        return masked[:_SHOWN]
    return f"{masked[:_BEFORE]} […] {masked[begins - _BEFORE : begins + _BEFORE]}"


def _of_sources(data: Data, sources: Sequence[Source]) -> Mapping[str, Sequence[Json]]:
    """What each source's rows depend on beside its files; a reader of one's own by its own text."""
    readers = [
        inspect.getsource(inspect.unwrap(source.shape.reader)) if source.shape.reader else ""
        for source in sources
    ]
    return {
        "data.format": [f"{source.format}{text}" for source, text in zip(data.sources, readers, strict=True)],
        "data.columns": [dict(source.shape.columns) for source in sources],
        "data.split": [source.split for source in sources],
        "data.source.weight": [source.weight for source in sources],
    }
