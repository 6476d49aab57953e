"""docs/json.md is what `--json` prints: every field that it names is there, and no other.

What takes a ship is held against it wherever a test ships (`Workshop.forge`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.cli.main import run_command
from tests.finished_runs import RECIPE, write_run
from tests.json_fields import check_fields, fields_of

_PART = {
    ("plan", "r.yaml"): {"problems"},
    ("doctor", "CUDA out of memory"): {"checks"},
    ("init", "NAME"): {"kinds"},
    ("init", "--list"): {"path"},
    ("stop",): set(),
    ("ps",): set(),
    ("gc",): set(),
    ("runs",): set(),
    ("show", "a"): set(),
    ("compare", "a", "b"): set(),
    ("estimate", "--base", "builtin:tiny"): set(),
}
"""Commands, and which of their fields are not of this form of them."""


@pytest.mark.parametrize("arguments", _PART, ids=" ".join)
def test_what_is_printed_is_what_is_documented(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(name)
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", **RECIPE}), encoding="utf-8")
    assert run_command([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    check_fields(arguments, shown)
    known = fields_of(arguments)
    assert known is not None
    assert known.keys() - shown.keys() <= _PART[arguments]


def test_a_failure_is_an_error_beside_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "missing.yaml", "--json"]) == 2
    [error] = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert error.keys() == {"code", "message", "hint", "problems"}
