"""Directories for temporary files: gone after their block, and after a kill at the next of their kind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from forge.tools.scratch import scratch


def test_what_a_killed_process_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = 2**22 + 1  # above what Linux gives out
    left = [tmp_path / f"forge-verify-{dead}-a", tmp_path / f"forge-header-{dead}-a"]
    lives = tmp_path / f"forge-verify-{os.getpid()}-b"
    for path in (*left, lives):
        (path / "f16").mkdir(parents=True)
    with scratch("verify") as made:
        assert made.parent == tmp_path and not any(made.iterdir())
        assert set(tmp_path.iterdir()) == {made, left[1], lives}
    assert set(tmp_path.iterdir()) == {left[1], lives}
