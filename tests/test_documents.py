"""The documents that are written by hand: the marks and recipe fields that they and the code name exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.cli.main import COMMANDS
from forge.recipe.fields import names_in, sections
from tests.json_fields import STAGES, documented

ROOT = Path(__file__).parent.parent
_MARKS = re.compile(r"\b(pitfalls?|silent wrongs?|style rows?) (\d+(?:(?:, | and )\d+)*)", re.IGNORECASE)
_IDS = re.compile(r"\b(?!F16|F32)([A-T]\d{1,2})\b(?= *[·:;,.)]| and )")
_FIELD = re.compile(
    r"(?<![\w/.])(?:base|data|train|export|verify|deploy|smoke)(?:\.[a-z_]+)+\b(?![/(]|\.[a-z]|\.py)"
)
# Endings of files that are named after a section.
_FILES = ("jsonl", "py", "json", "yaml", "txt", "csv", "md", "log", "sh")


def _sources(*directories: str) -> Iterator[tuple[str, str]]:
    for directory in directories:
        for path in sorted((ROOT / directory).rglob("*.py")):
            if "cases" not in path.parts:
                yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def _numbers(document: str, section: str) -> set[int]:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8").partition(section)[2]
    return {
        int(number)
        for number in re.findall(r"^(?:\| )?(\d+)(?: \||\.)", text.partition("\n## ")[0], re.MULTILINE)
    }


KNOWN = {
    "pitfall": _numbers("pitfalls.md", "## Pitfalls"),
    "silent wrong": _numbers("pitfalls.md", "## Silent wrongs"),
    "style row": _numbers("style.md", "| # | habit"),
}


def test_every_mark_is_in_a_document() -> None:
    assert len(KNOWN["pitfall"]) == 66 and len(KNOWN["silent wrong"]) == 18 and len(KNOWN["style row"]) == 27
    unknown = [
        f"{path}: {match[0]}"
        for path, text in _sources("forge", "tests", "bench")
        for match in _MARKS.finditer(text)
        if not {int(number) for number in re.findall(r"\d+", match[2])} <= KNOWN[match[1].lower().rstrip("s")]
    ]
    assert unknown == []


def test_every_requirement_that_a_test_names_is_in_a_document() -> None:
    listed = set(
        re.findall(r"\b[A-T]\d{1,2}\b", (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8"))
    )
    unknown = []
    for path, text in _sources("tests"):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test"):
                continue
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            unknown += [f"{path}: {name}" for name in _IDS.findall(first) if name not in listed]
    assert unknown == []


def _strings(text: str) -> Iterator[str]:
    """Every string of a module that is no docstring: messages, hints, helps."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def _is_field(name: str) -> bool:
    section, _, last = name.replace("smoke.", "smoke.*.", 1).rpartition(".")
    return name in sections() or (section in sections() and last in names_in(section))


def fields_in(text: str) -> list[str]:
    """Names in `text` that look like a recipe field and are none."""
    named = (match[0] for match in _FIELD.finditer(text))
    return [name for name in named if name.rpartition(".")[2] not in _FILES and not _is_field(name)]


def test_every_recipe_field_that_a_message_names_exists() -> None:
    unknown = [
        f"{path}: {name}"
        for path, text in _sources("forge")
        if path not in ("forge/recipe/old_names.py",)
        for string in _strings(text)
        if " " in string and "forge." not in string
        for name in fields_in(string)
    ]
    assert unknown == []


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md", "docs/ollama.md", "CHANGELOG.md"])
def test_every_recipe_field_that_a_document_names_exists(document: str) -> None:
    assert fields_in((ROOT / document).read_text(encoding="utf-8")) == []


def test_a_field_that_is_none_would_be_seen() -> None:
    assert fields_in("set train.epochs or data.supervise") == ["data.supervise"]


def test_the_json_of_every_command_is_documented() -> None:
    assert {*documented(), *STAGES} - {"certificate"} == set(COMMANDS), "a row in docs/json.md"
