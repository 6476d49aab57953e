"""The pictures of `forge plan` in the README show what the command prints today."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pictures import PICTURES, ROOT, ROWS, picture, words

pytestmark = pytest.mark.training  # trl's template of Qwen3


@pytest.mark.parametrize("kind", ROWS)
def test_a_picture_says_what_a_plan_says(kind: str) -> None:
    """F9: if this fails, `make documents`."""
    shown = (PICTURES / f"{kind}.svg").read_text(encoding="utf-8")
    assert words(shown) == words(picture(kind))
    assert words(shown)[0] == f"$ forge plan {kind}.yaml"
    assert any("⟦" in line for line in words(shown)), "what carries loss is seen"
    assert len(shown) < 20_000 and "http" not in shown.replace("http://www.w3.org/2000/svg", "")


def test_the_readme_shows_each() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(path.stem for path in PICTURES.iterdir()) == sorted(ROWS)
    assert [kind for kind in ROWS if f"]({Path('docs/plan') / kind}.svg)" not in readme] == []
