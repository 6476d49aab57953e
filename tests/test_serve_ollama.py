"""The runtime ollama: it serves when a model has answered, for as long as its server is there."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from forge.errors import StageError
from forge.serve.client import Client
from forge.serve.ollama import serve_ollama
from forge.serve.runtime import ServerSettings
from tests.fake_ollama import FakeOllama
from tests.servers import HELLO
from tests.shipping import Workshop
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]


def test_it_has_answered_and_is_there(
    ollama_url: str, model_name: str, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in memory already: it was asked before anyone was told that it serves."""
    monkeypatch.setenv("OLLAMA_HOST", ollama_url)
    with serve_ollama(ServerSettings(tiny_gguf, model_name, 512)) as endpoint:
        assert endpoint.why_gone() == ""
        with Client(endpoint) as client:
            assert client.chat(HELLO).text == REPLY


def test_a_model_that_answers_no_chat_gets_no_name(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOllama() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        fake.troubles["/v1/chat/completions"] = ("error", 500, "model requires more system memory")
        with pytest.raises(StageError, match=r"answers no chat with .*: model requires more system memory"):
            with serve_ollama(ServerSettings(tiny_gguf, "yoda", 512)):
                raise AssertionError("it served")
        assert fake.models == {}


def test_the_command_says_what_it_knows_and_ends_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots, threads and device are Ollama's; a server that is gone is served by nobody."""
    place = Workshop(tmp_path / "work", tmp_path / "home")
    place.directory.mkdir()
    write_tiny_gguf(place.directory / "tiny.gguf")
    with contextlib.ExitStack() as stack:
        fake = stack.enter_context(FakeOllama())
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        command = ("serve", "tiny.gguf", "--runtime", "ollama", "--json")
        with place.start(*command) as child:
            lines = child.lines()
            assert json.loads(next(lines))["endpoint"] == fake.url
            stack.close()
            assert child.ends_within(60)
            error = json.loads(list(lines)[-1])["error"]
            assert child.status == error["code"] == 4
            assert error["message"].startswith(f"the Ollama server at {fake.url} has ended")
    said = (place.directory / "errors.txt").read_text()
    assert "context 4096 tokens\n" in said and "requests at once" not in said
    assert place.forge("ps").fields == {"running": []}
