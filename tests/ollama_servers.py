"""What the tests of Ollama share, a plugin: the servers that they ask, and the files that go there.

The contract tests ask the fake always, and a live server where OLLAMA_HOST is set.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.chat.template import ChatTemplate
from forge.tools.ollama import Ollama, server_url
from tests.fake_ollama import FakeOllama
from tests.makers.tokenizer import CHATML
from tests.tiny_gguf import write_tiny_gguf

# The template of the files that are imported: `builtin:tiny`'s, as an export pins it.
PINNED = ChatTemplate(CHATML, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}).pinned_source()


@pytest.fixture(scope="module", params=["fake", pytest.param("live", marks=pytest.mark.ollama)])
def ollama_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The server that a statement about Ollama is held against; skips where there is no live one."""
    if request.param == "fake":
        with FakeOllama() as server:
            yield server.url
        return
    if not os.environ.get("OLLAMA_HOST"):
        pytest.skip("OLLAMA_HOST is not set: there is no live server")
    yield server_url()


@pytest.fixture
def ollama_client(ollama_url: str) -> Iterator[Ollama]:
    with Ollama(ollama_url) as client:
        yield client


@pytest.fixture
def model_name(ollama_client: Ollama) -> Iterator[str]:
    """A name that nobody uses; its model is deleted afterwards."""
    made = f"forge-test-{secrets.token_hex(4)}"
    yield made
    if ollama_client.digest(made):
        ollama_client.delete(made)


@pytest.fixture
def fake_ollama() -> Iterator[FakeOllama]:
    """A fake that nobody has asked yet."""
    with FakeOllama() as server:
        yield server


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def pinned_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", template=PINNED)


def make(server: Ollama, name: str, gguf: Path, **fields: Any) -> None:
    """Create `name` from a GGUF; `fields` are those of /api/create."""
    server.create(name, {"files": {gguf.name: server.push(gguf, "a blob")}, **fields})
