"""A misspelt key of a request, a measurement, a manifest or a leg is a type error, not another model."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from forge.process import run

ROOT = Path(__file__).parent.parent
SEEDED = {
    "the export request": ("forge/export/run.py", "model.merge_base", "model.merge_bsae"),
    "a measurement": ("forge/verify/cause.py", "measured.legs", "measured.lges"),
    "the manifest": ("forge/commands/bundle.py", "manifest.base.licence", "manifest.base.licenec"),
    "a training request": ("forge/train/run.py", "request.pad_token", "request.pad_toekn"),
    "a recipe's section": ("forge/train/arguments.py", "settings.neftune_alpha", "settings.neftnue_alpha"),
    "what evaluation measured": ("forge/stages/evaluate.py", "measured.loss_error", "measured.loss_erorr"),
    "a stage's facts": ("forge/stages/deploy.py", "data.longest_tokens", "data.longest_tokesn"),
    "the live server's proof": ("forge/serve/live.py", "self.problems[0]", "self.problmes[0]"),
    "a leg": ("forge/verify/compare.py", "leg.nmse ", "leg.nmes "),
}


@pytest.mark.slow
@pytest.mark.programs
@pytest.mark.timeout(600)
def test_mypy_refuses_each_misspelling(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "forge", tmp_path / "forge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    for path, right, wrong in SEEDED.values():
        text = (tmp_path / path).read_text(encoding="utf-8")
        assert right in text, path
        (tmp_path / path).write_text(text.replace(right, wrong, 1), encoding="utf-8")
    files = [str(tmp_path / path) for path, _, _ in SEEDED.values()]
    done = run([sys.executable, "-m", "mypy", "--strict", *files], directory=tmp_path)
    for path, _, wrong in SEEDED.values():
        name = wrong.rpartition(".")[2].strip(" []0")
        assert any(path in line and f'has no attribute "{name}"' in line for line in done.output.splitlines())
