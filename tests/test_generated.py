"""The generated documents are those that the code generates now."""

from __future__ import annotations

import pytest

from tests.generated import ROOT, documents


@pytest.mark.parametrize("path", sorted(documents()))
def test_document_is_current(path: str) -> None:
    """If this fails: make documents."""
    assert (ROOT / path).read_text(encoding="utf-8") == documents()[path]


def test_every_modelfile_example_is_generated() -> None:
    there = {f"Modelfiles/{path.name}" for path in (ROOT / "Modelfiles").iterdir()}
    assert there == {path for path in documents() if path.startswith("Modelfiles/")}
