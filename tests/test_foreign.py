"""Another program called `forge` on the PATH is noticed; our own, however it is reached, is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forge import report
from forge.tools.foreign import foreign_forge, warn_of_foreign_forge
from tests.told_sink import Told

OURS = Path(sys.executable).with_name("forge")


def program(directory: Path) -> Path:
    directory.mkdir()
    path = directory / "forge"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_foreign_one_that_comes_first_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = program(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{other.parent}:{OURS.parent}")
    assert foreign_forge() == other
    told = Told()
    report.configure(sink=told)
    warn_of_foreign_forge()
    assert told.texts == [
        ("warning", f"the `forge` on your PATH is another program: {other}. Use {OURS} or `python -m forge`.")
    ]


def test_ours_is_not_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own directory, and by a link elsewhere, as pipx makes them."""
    assert OURS.is_file(), "the tests run in an environment where forge is installed"
    other = program(tmp_path / "later")
    links = tmp_path / "links"
    links.mkdir()
    (links / "forge").symlink_to(OURS)
    told = Told()
    report.configure(sink=told)
    for first in (OURS.parent, links):
        monkeypatch.setenv("PATH", f"{first}:{other.parent}")
        assert foreign_forge() is None
        warn_of_foreign_forge()
    assert told.texts == []


def test_ours_is_known_by_its_installer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `pip install --user`: the script does not lie beside the interpreter."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "elsewhere" / "python"))
    monkeypatch.setenv("PATH", str(OURS.parent))
    assert foreign_forge() is None


def test_none_at_all_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert foreign_forge() is None
