"""The servers that the contract tests of Ollama ask: the fake always, a live one where OLLAMA_HOST is set."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.tools.ollama import Ollama, server_url
from tests.fake_ollama import FakeOllama

# For a fixture: `params=SERVERS`, and `with asked(request.param) as url`.
SERVERS = ("fake", pytest.param("live", marks=pytest.mark.ollama))


@contextlib.contextmanager
def asked(kind: str) -> Iterator[str]:
    """The URL of the server; skips where there is no live one."""
    if kind == "fake":
        with FakeOllama() as server:
            yield server.url
        return
    if not os.environ.get("OLLAMA_HOST"):
        pytest.skip("OLLAMA_HOST is not set: there is no live server")
    yield server_url()


@contextlib.contextmanager
def name_on(server: Ollama) -> Iterator[str]:
    """A name that nobody uses; its model is deleted afterwards."""
    made = f"forge-test-{secrets.token_hex(4)}"
    yield made
    if server.digest(made):
        server.delete(made)


def make(server: Ollama, name: str, gguf: Path, **fields: Any) -> None:
    """Create `name` from a GGUF; `fields` are those of /api/create."""
    server.create(name, {"files": {gguf.name: server.push(gguf, "a blob")}, **fields})
