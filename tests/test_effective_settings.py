"""What a run would use is shown whole, each value with where it is from (G8)."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.cli.main import run_command
from forge.recipe.fields import values
from forge.recipe.load import load

RECIPE = """name: mine
base: builtin:tiny
data: {source: builtin:yoda, columns: {prompt: sentence, completion: translation_extra}}
train:
  preset: book-ch5
  epochs: 2
"""


def test_a_plan_shows_every_value_with_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """G8: the recipe's line, the preset, the override, or the default."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    assert run_command(["plan", "mine.yaml", "-v", "-o", "train.weight_decay=0.1"]) == 0
    said = "".join(capsys.readouterr())
    for name, value in values(load(tmp_path / "mine.yaml", ["train.weight_decay=0.1"]).recipe).items():
        assert f"{name}: {value!r}  (" in said
    for line in (
        "train.epochs: 2.0  (mine.yaml:6)",
        "train.weight_decay: 0.1  (-o train.weight_decay)",
        "train.gradient_accumulation: 2  (",
        "train.optimizer: 'adamw_torch'  (default)",
    ):
        assert line in said, line
