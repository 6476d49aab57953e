"""The quickstart whole: what a person sees who types `make ship`, and the figures of the README."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import link_converters
from tests.shipping import PURE, STAGES, Workshop, processes_of

QUICKSTART = Path(__file__).parent.parent / "templates" / "recipes" / "quickstart.yaml"


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.timeout(2400)
def test_the_shipped_file_behind_its_server_speaks_yoda(tmp_path: Path) -> None:
    """It learned: at least 54 of 60 held-out sentences exactly, where the base answers under 5 %."""
    home = link_converters(tmp_path / "home")
    (tmp_path / "work").mkdir()
    workshop = Workshop(tmp_path / "work", home)
    shutil.copy(QUICKSTART, workshop.directory / "recipe.yaml")
    answer = workshop.ship()
    learned = answer.fields["learned"]
    assert (learned["metric"], learned["rows"]) == ("exact_match", 60)
    assert learned["before"] < 0.05
    assert learned["served"] >= 0.9
    assert "learned: 60 held-out rows, exact answers: base 0%" in answer.said
    [smoke] = answer.fields["smoke"]
    assert smoke["ok"] and smoke["answer"].startswith("In this sandwich, there is bacon.")
    assert list(answer.cached) == [*STAGES] and not any(answer.cached.values())

    again = workshop.ship()
    assert {name for name, cached in again.cached.items() if cached} == {*PURE}
    assert again.fields["learned"] == learned and again.fields["smoke"] == answer.fields["smoke"]
    assert processes_of(home) == []
