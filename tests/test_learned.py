"""What counts as learned: an improvement that the held-out rows can tell from none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.stages.evaluate import has_improved, learned
from forge.train.evaluate import standard_error
from tests.shipping import Workshop


def facts(before: float, after: float, error: float | None, rows: int) -> dict[str, Any]:
    return {"loss": {"before": before, "after": after}, "loss_error": error, "rows": rows}


@pytest.mark.parametrize(
    ("before", "after", "error", "rows", "improved"),
    [
        (7.042428, 7.042426, 0.0, 5, False),  # a learning rate of 1e-8: what arithmetic alone could do
        (3.0, 1.0, 0.2, 20, True),
        (3.0, 2.9, 0.2, 20, False),  # less than the rows differ in it
        (3.0, 2.9, 0.02, 20, True),
        (3.0, 2.9, 0.02, 2, False),  # two rows say little
        (3.0, 1.0, None, 1, True),
        (3.0, 3.0, 0.0, 20, False),
        (3.0, 4.0, 0.01, 20, False),
    ],
)
def test_an_improvement_beyond_its_uncertainty(
    before: float, after: float, error: float | None, rows: int, improved: bool
) -> None:
    assert has_improved(facts(before, after, error, rows)) is improved


def test_the_standard_error_by_hand() -> None:
    """Rows of one token each: the usual one of a mean. Rows that all change alike: none."""
    assert standard_error([(2.0, 1)], [(1.0, 1)]) is None
    assert standard_error([(2.0, 1), (4.0, 1)], [(1.0, 1), (1.0, 1)]) == pytest.approx(1.0)
    assert standard_error([(2.0, 2), (4.0, 4)], [(1.0, 2), (2.0, 4)]) == pytest.approx(0.0)


def test_nothing_measured_is_no_figure() -> None:
    assert learned({"rows": 0}) is None


@pytest.mark.training
@pytest.mark.programs
@pytest.mark.timeout(600)
def test_few_rows_are_normal(workshop: Workshop) -> None:
    """Four rows with a tenth held out: nothing is measured, which is not that nothing was learned."""
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}."} for n in range(4)]
    path: Path = workshop.directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"source": "rows.jsonl", "columns": {}, "limit": 4, "eval": 0.1}
    workshop.recipe(data=data, train={"method": "lora", "max_steps": 2}, verify=None)
    answer = workshop.ship("--until", "evaluate")
    assert answer.fields["learned"] is None
    assert "what was learned is not measured" in answer.said
