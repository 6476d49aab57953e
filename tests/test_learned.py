"""What counts as learned: an improvement that the held-out rows can tell from none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from forge.pipeline.stage import Result
from forge.runs.manifest import Learned
from forge.stages.evaluate import (
    EvaluateStage,
    figures,
    has_improved,
    learned,
    least_improvement,
    nothing_learned,
    remarks,
)
from forge.train.evaluate import Evaluated, Preferred, standard_error
from forge.train.figures import Change
from forge.train.outcome import fall_at_the_end, still_falling
from tests.models import evaluated
from tests.shipping import Workshop


def facts(before: float, after: float, error: float | None, rows: int) -> Evaluated:
    return evaluated(before, after, loss_error=error, rows=rows)


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


def test_of_pairs_the_share_that_is_preferred_is_told() -> None:
    """Before training the reward of DPO is nothing for either answer."""
    preferred = Preferred(accuracy=0.75, margin=0.5, error=0.1, likelier=Change(0.5, 0.7))
    measured = evaluated(rows=12, preferred=preferred)
    assert learned(measured) == Learned("preference", 0.0, 0.75, rows=12)


def test_the_standard_error_by_hand() -> None:
    """Rows of one token each: the usual one of a mean. Rows that all change alike: none."""
    assert standard_error([(2.0, 1)], [(1.0, 1)]) is None
    assert standard_error([(2.0, 1), (4.0, 1)], [(1.0, 1), (1.0, 1)]) == pytest.approx(1.0)
    assert standard_error([(2.0, 2), (4.0, 4)], [(1.0, 2), (2.0, 4)]) == pytest.approx(0.0)


# One-sided 95 % points of Student's t by degrees of freedom, as statistical tables print them.
_PUBLISHED = {
    1: 6.314, 2: 2.920, 3: 2.353, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 10: 1.812, 11: 1.796, 12: 1.782,
    13: 1.771, 14: 1.761, 15: 1.753, 20: 1.725, 30: 1.697, 60: 1.671, 120: 1.658,
}  # fmt: skip


@pytest.mark.parametrize(("freedom", "published"), _PUBLISHED.items())
def test_what_rows_can_tell_is_students_t(freedom: int, published: float) -> None:
    assert least_improvement(facts(3.0, 1.0, 1.0, freedom + 1)) == pytest.approx(published, abs=0.004)


def test_more_rows_tell_a_smaller_improvement() -> None:
    least = [least_improvement(facts(3.0, 1.0, 1.0, rows)) for rows in range(2, 200)]
    assert least == sorted(set(least), reverse=True)


def test_nothing_measured_is_no_figure() -> None:
    stage = EvaluateStage.__new__(EvaluateStage)
    assert stage.findings({"evaluate": Result("evaluate", True, 0.0, {"rows": 0})}) == {"learned": None}


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


def test_worse_than_guessing_is_nothing_learned() -> None:
    """A perplexity of 1,526 over 1,456 tokens fell from 7,000, and is worse than guessing all the same."""
    said = nothing_learned(evaluated(8.85, math.log(1526)))
    assert said is not None and "1,526 is worse than guessing among 1,456 tokens" in said
    worse = nothing_learned(evaluated(2.0, 4.0))
    assert worse is not None and worse.endswith("the base itself answers these rows better")
    assert nothing_learned(evaluated(4.0, 2.0)) is None
    assert "perplexity 54.6 -> 7.389" in figures(evaluated(4.0, 2.0))


def test_what_a_person_should_know_of_what_was_learned() -> None:
    assert [*remarks(evaluated(6.0, 2.0))] == []
    (far,) = remarks(evaluated(6.0, 5.0))
    assert "148.4 of 1,456 tokens: better than guessing, but far from an answer" in far
    (falling,) = remarks(evaluated(3.0, 2.0, falling="the training loss (2.5 -> 2.1 in the second half)"))
    assert "was still falling when training ended" in falling


def test_what_is_still_falling() -> None:
    """Held-out losses where they were measured; else those of training, beyond noise."""
    assert still_falling([3.0, 2.5, 2.2]) and not still_falling([3.0, 2.2, 2.19]) and not still_falling([3.0])
    steps = [4 - 0.05 * step for step in range(40)]
    assert fall_at_the_end(steps, heldout=2.2) == pytest.approx((2.775, 2.275))
    assert fall_at_the_end(steps, heldout=4.0) is None
    assert fall_at_the_end(steps[:12], heldout=3.5) is None
    assert fall_at_the_end([3.0 + 0.3 * (-1) ** step for step in range(40)], heldout=3.0) is None
