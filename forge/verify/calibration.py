"""What the worker is asked to calibrate, and what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge.codec import from_plain, to_plain
from forge.export.request import Ingredients


@dataclass(frozen=True)
class CalibrationRequest:
    """An importance matrix of the rows in `rows`, and with `max_kl` the smallest of `types` within it.

    `rows` and `measured_rows` are JSONL files of input_ids: to calibrate on, and to compare on. `types` go
    from the largest down, and are empty without a budget.
    """

    model: Ingredients
    rows: Path
    measured_rows: Path
    out: Path
    name: str
    types: tuple[str, ...] = ()
    max_kl: float | None = None
    plain: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Importance:
    """What the matrix was made of."""

    weights: int
    rows: int
    tokens: int
    idle_experts: int


@dataclass(frozen=True)
class TypeRow:
    """One type's figures: KL divergence from F16 in nats, `top1` the share of equal top tokens."""

    quant: str
    bytes: int
    tokens_per_second: float
    kl_mean: float
    kl_error: float
    kl_max: float
    top1: float
    perplexity: float


@dataclass(frozen=True)
class MeasuredOn:
    rows: int
    positions: int


@dataclass(frozen=True)
class Search:
    """The types that were measured, and those that were left out with the reason. `quant`: the one chosen."""

    max_kl: float
    quant: str | None
    types: Sequence[TypeRow]
    left_out: Mapping[str, str]
    f16: TypeRow
    measured_on: MeasuredOn
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibrated:
    """The matrix, and with a budget the search."""

    importance: Importance
    search: Search | None = None

    def facts(self) -> Mapping[str, object]:
        """As the manifest and `--json` have it: the search's fields beside `importance`."""
        return {"importance": to_plain(self.importance), **(to_plain(self.search) if self.search else {})}

    @staticmethod
    def of_facts(facts: Mapping[str, object]) -> Calibrated:
        search = {name: value for name, value in facts.items() if name != "importance"}
        importance = from_plain(Importance, facts["importance"])
        return Calibrated(importance, from_plain(Search, search) if search else None)
