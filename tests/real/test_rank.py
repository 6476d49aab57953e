"""The rank ablation of templates/sweeps/ on the real small model: what the README shows of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shipping import Workshop

pytestmark = [
    pytest.mark.training, pytest.mark.programs, pytest.mark.slow, pytest.mark.campaign,
    pytest.mark.timeout(3600),
]  # fmt: skip


def test_a_higher_rank_learns_more_of_the_same_rows(workshop: Workshop) -> None:
    """T1: four ranks of one scale; the held-out loss falls with each, and the picture shows it."""
    answer = workshop.forge("sweep", "rank")
    assert answer.code == 0, answer.said
    figures = [one["figures"] for one in answer.fields["runs"]]
    assert [one["values"]["train.lora.r"] for one in answer.fields["runs"]] == [4, 8, 16, 32]
    parameters = [one["trainable_parameters"] for one in figures]
    assert parameters == [460_800 * factor for factor in (1, 2, 4, 8)]
    losses = [one["loss_after"] for one in figures]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]
    assert Path(answer.fields["picture"]).stat().st_size < 10_000
