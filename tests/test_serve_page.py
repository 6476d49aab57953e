"""llama-server's own web page, driven as a person would: type, press Enter, read the answer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from forge.serve.embedded import serve_embedded
from forge.serve.runtime import ServerSettings
from tests.browser import browser, size_of
from tests.conftest import ROOT
from tests.tiny_gguf import REPLY, write_tiny_gguf

QUESTION = "There is bacon in this sandwich."
PICTURE = ROOT / "docs" / "web-page.png"


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_page_answers_what_is_typed(tmp_path: Path) -> None:
    """R2: the page at the port. FORGE_PICTURE=1 renews the picture in the documents."""
    model = write_tiny_gguf(tmp_path / "yoda.gguf")
    with serve_embedded(ServerSettings(model, "yoda", 1024, threads=1)) as endpoint, browser() as page:
        page.open(endpoint.url)
        page.wait_for("!!document.querySelector('textarea')")
        page.run("document.querySelector('textarea').focus()")
        page.type(QUESTION)
        page.wait_for(f"document.querySelector('textarea').value === {json.dumps(QUESTION)}")
        page.press_enter()
        page.wait_for(f"document.body.innerText.includes({json.dumps(REPLY)})")
        assert QUESTION in page.run("document.body.innerText")
        picture = page.picture()
    if os.environ.get("FORGE_PICTURE"):
        PICTURE.write_bytes(picture)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000


def test_picture_in_the_documents_is_small() -> None:
    assert PICTURE.stat().st_size < 200_000
    assert min(size_of(PICTURE)) > 400
