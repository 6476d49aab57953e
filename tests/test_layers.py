"""The sources keep the rules of the house, and each rule can fail. Style rows 3, 4, 13, 14 and 20."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.layers import ARROWS, HEAVY, circle_faults, faults, name_faults, patch_faults

ROOT = Path(__file__).parent.parent


def sources() -> dict[str, str]:
    found = sorted((ROOT / "forge").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


def test_the_sources_keep_the_rules() -> None:
    assert faults(sources()) == []


def test_every_room_has_its_row_in_the_table() -> None:
    rooms = {name.split("/")[1].removesuffix(".py") for name in sources()}
    assert rooms - {"__init__"} <= set(ARROWS)


def test_the_table_has_no_circle() -> None:
    below: dict[str, set[str]] = {}
    while len(below) < len(ARROWS):
        ready = {room for room, targets in ARROWS.items() if room not in below and targets <= below.keys()}
        assert ready, f"these import each other in a circle: {ARROWS.keys() - below.keys()}"
        below |= {room: ARROWS[room] for room in ready}


CIRCLE = {
    "forge/data/a.py": "from forge.data.b import b",
    "forge/data/b.py": "from forge.data import c",
    "forge/data/c.py": "def f() -> None:\n    import forge.data.a",
    "forge/data/d.py": "from forge.data.a import a",
}


def test_files_that_import_each_other_are_named_with_the_import_inside_a_function() -> None:
    assert list(circle_faults(CIRCLE)) == [
        "forge/data/a.py:1: imports forge/data/b.py, which leads back here",
        "forge/data/b.py:1: imports forge/data/c.py, which leads back here",
        "forge/data/c.py:2: imports forge/data/a.py inside a function, which leads back here",
    ]
    assert list(circle_faults({**CIRCLE, "forge/data/c.py": "x = 1"})) == []


def test_a_public_name_is_in_one_file() -> None:
    twice = {"forge/data/a.py": "class Row: ...", "forge/serve/b.py": "def f() -> None: ...\nclass Row: ..."}
    assert list(name_faults(twice)) == ["forge/serve/b.py:2: Row is in forge/data/a.py:1, too"]
    assert list(name_faults({path: text.replace("Row", "_Row") for path, text in twice.items()})) == []
    assert list(name_faults(dict.fromkeys(twice, "def main() -> None: ..."))) == []
    assert list(name_faults({**dict.fromkeys(twice, ""), "forge/api.py": "class Row: ..."})) == []


BAD = {
    "an upward arrow": (
        "forge/store/x.py",
        "from forge.pipeline.plan import plan",
        "store may not import pipeline",
    ),
    "a room by name": ("forge/chat/x.py", "from forge import store", "chat may not import store"),
    "inside a function": (
        "forge/data/x.py",
        "def f() -> None:\n    import forge.train.run",
        "data may not import train",
    ),
    "the commands": ("forge/stages/x.py", "from forge.cli.main import main", "stages may not import cli"),
    "a relative import": (
        "forge/data/x.py",
        "from ..cli import main",
        "a relative import: the layers are read from whole names",
    ),
    "subprocess": ("forge/tools/x.py", "import subprocess", "subprocess outside process.py"),
    "a program": (
        "forge/tools/x.py",
        "import os\nos.system('true')",
        "os.system: programs are started by process.py",
    ),
    "print": ("forge/serve/x.py", "print('done')", "print outside report.py"),
    "a broad except": (
        "forge/serve/x.py",
        "try:\n    f()\nexcept (ValueError, Exception):\n    g()",
        "catches every exception outside the edges",
    ),
    "a bare except": (
        "forge/serve/x.py",
        "try:\n    f()\nexcept:\n    g()",
        "catches every exception outside the edges",
    ),
    "a slow command": ("forge/cli/x.py", "import httpx", "httpx is imported by every command"),
    "a slow foundation": ("forge/report.py", "import rich", "rich is imported by every command"),
    "a long file": ("forge/store/x.py", "x = 1\n" * 450, "451 lines, at most 450"),
    "a long function": (
        "forge/store/x.py",
        "def f() -> None:\n" + "    x = 1\n" * 80,
        "f: 81 lines, at most 80",
    ),
    "a full __init__": ("forge/store/__init__.py", "x = 1", "an __init__.py that is not empty"),
    "a name that says nothing": (
        "forge/store/x.py",
        "for one in (1, 2):\n    f(one)",
        "one: what does it hold?",
    ),
    "a parameter that says nothing": (
        "forge/store/x.py",
        "def f(told: int) -> None: ...",
        "told: what does it hold?",
    ),
    "no docstring": ("forge/store/x.py", "", "no docstring: what is covered, and what is not?"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_is_found(case: str) -> None:
    path, text, said = BAD[case]
    if case != "no docstring":
        text = f'"""Bad."""\n{text}'
    assert [fault.partition(": ")[2] for fault in faults({path: text})] == [said]


@pytest.mark.parametrize("package", sorted(HEAVY))
def test_a_heavy_import_belongs_into_a_function(package: str) -> None:
    at_top = f'"""Bad."""\nimport {package}\n'
    inside = f'"""Good."""\n\n\ndef f() -> None:\n    import {package}\n'
    for_types = f'"""Good."""\n\nif TYPE_CHECKING:\n    import {package}\n'
    said = f"forge/train/x.py:2: {package} is imported at the top of a module"
    assert faults({"forge/train/x.py": at_top}) == [said]
    assert faults({"forge/train/x.py": inside}) == faults({"forge/train/x.py": for_types}) == []


def test_what_a_test_patches_is_there() -> None:
    """A name that moved is noticed here in a second, and not by a slow test of an hour later."""
    here = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py"))}
    assert (
        list(patch_faults({str(path.relative_to(ROOT)): text for path, text in here.items()}, sources()))
        == []
    )


def test_a_patch_of_what_is_not_there_is_found() -> None:
    module = "from os import path\nROWS = 1\nclass Row: ...\nif path: later = 2"
    forge = {"forge/data/__init__.py": "", "forge/data/a.py": module}
    there = ["a, 'path'", "a, 'ROWS'", "a, 'Row'", "a, 'later'", "'forge.data.a.ROWS'"]
    gone = ["a, '_rows'", "'forge.data.a._rows'", "'forge.data.b.ROWS'"]
    lines = ["from forge.data import a", *(f"monkeypatch.setattr({what}, 2)" for what in (*there, *gone))]
    assert list(patch_faults({"tests/t.py": "\n".join(lines)}, forge)) == [
        "tests/t.py:7: forge.data.a._rows is not there to patch",
        "tests/t.py:8: forge.data.a._rows is not there to patch",
        "tests/t.py:9: forge.data.b is not there to patch",
    ]
