"""Ollama's server as its client finds it: down, full, slow or not there; its address; how it quotes."""

# ruff: noqa: E501 - one case a line
from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import httpx
import pytest

from forge.chat.hand_over import hand_over_of
from forge.cli.main import run_command
from forge.errors import MissingToolError, RecipeError, StageError
from forge.serve.ollama import import_model
from forge.serve.runtimes import check_runtime
from forge.tools import ollama as tool
from forge.tools.ollama import Ollama, OllamaError, server_url
from forge.tools.ollama_server import reach, watch
from tests.fake_ollama import FakeOllama
from tests.ollama_servers import PINNED
from tests.tiny_gguf import write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]


TROUBLES = {
    "full": (("/api/blobs/", "error", 500, "write blob: no space left on device"), "no space left on device", "its disk is full"),
    "500": (("/api/create", "error", 500, "out of luck"), r"\(500\): out of luck", ""),
    "dies in an upload": (("/api/blobs/", "die", 0, ""), "broke off while it", "its own log"),
    "dies in a chat": (("/api/chat", "die", 0, ""), "broke off while it", "its own log"),
    "a late error": (("/api/create", "late", 0, "llama-quantize: exit status 1"), "made forge-import-.*: llama-quantize: exit status 1", ""),
    "no debug rendering": (("/api/chat", "error", 404, "404 page not found"), r"\(404\)", ""),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_in_trouble_is_one_clear_error(
    fake_ollama: FakeOllama, tmp_path: Path, trouble: str
) -> None:
    (route, kind, status, message), said, hint = TROUBLES[trouble]
    path = write_tiny_gguf(tmp_path / "m.gguf", template=PINNED)
    with Ollama(fake_ollama.url) as server:
        import_model(server, "yoda", path, hand_over_of(path))
        other = write_tiny_gguf(tmp_path / "n.gguf", template=PINNED, reply="Another, this is.")
        before = server.digest("yoda")
        fake_ollama.troubles[route.rstrip("/")] = fake_ollama.troubles[route] = (kind, status, message)
        with pytest.raises(OllamaError, match=said) as caught:
            import_model(server, "yoda", other, hand_over_of(other))
        fake_ollama.troubles.clear()
        assert hint in caught.value.hint
        assert server.digest("yoda") == before


def test_a_server_that_does_not_answer_in_time(fake_ollama: FakeOllama) -> None:
    fake_ollama.troubles["/api/version"] = ("slow", 1, "")
    with Ollama(fake_ollama.url, timeout=httpx.Timeout(0.2)) as server:
        with pytest.raises(OllamaError, match="gave no answer in time while it asked its version"):
            server.version()


def test_another_server_at_that_address(fake_ollama: FakeOllama) -> None:
    fake_ollama.version = '"'
    with Ollama(f"{fake_ollama.url}/nowhere") as server, pytest.raises(OllamaError, match=r"\(404\)"):
        server.version()


def test_a_missing_server_says_how_to_start_it(
    monkeypatch: pytest.MonkeyPatch, pinned_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pitfall 55."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert run_command(["import", str(pinned_gguf), "--name", "yoda", "--json"]) == 3
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert told["message"] == "no Ollama server answers at http://127.0.0.1:9"
    assert told["hint"].startswith("start it with: ollama serve")
    with pytest.raises(MissingToolError):
        check_runtime("ollama")
    with pytest.raises(MissingToolError, match="no Ollama server answers at http://localhost:8"):
        check_runtime("ollama", host="localhost", port=8)


def test_it_is_started_where_the_program_is_here(
    pinned_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Q1: for the time of the command, and stopped after it."""
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ntest "$1" = serve && exec {sys.executable} -m tests.fake_ollama\n')
    program.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
    check_runtime("ollama")
    assert run_command(["import", str(pinned_gguf), "--name", "yoda", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["name"] == "yoda" and told["prompt_checked"] > 40 and told["digest"]
    with pytest.raises(MissingToolError):
        Ollama(server_url()).version()


def test_a_server_is_gone_when_it_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart is no end; nor is it looked for at every turn."""
    with FakeOllama() as first:
        pass
    with watch(first.url) as why_gone:
        assert [why_gone() for _ in range(9)] == [""] * 9
        monkeypatch.setattr("forge.tools.ollama_server.SECONDS_BETWEEN_LOOKS", 0.0)
        assert [why_gone(), why_gone()] == ["", ""]
        with FakeOllama(port=first.port):
            assert why_gone() == ""
        assert [why_gone(), why_gone()] == ["", ""]
        assert why_gone() == f"the Ollama server at {first.url} has ended, or cannot be reached any more"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.0.1", "[::1]"])
def test_a_program_that_does_not_start(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name of this machine is one: it is tried there."""
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(StageError, match="was started and does not answer"):
        with reach(f"http://{host}:9"):
            pass


def test_stops_are_read_as_go_quotes_them() -> None:
    quoted = {
        r'"\x7f"': "\x7f",
        r'"\U000e0001"': "\U000e0001",
        r'"\u00a0<|x|>"': "\u00a0<|x|>",
        r'"a\n\"\\\a"': 'a\n"\\\a',
        '"é漢"': "é漢",
        "plain": "plain",
    }
    shown = "\n".join(f"stop                           {text}" for text in quoted)
    assert tool.stops_in({"parameters": f"{shown}\nnum_ctx    5"}) == set(quoted.values())
    with pytest.raises(OllamaError, match="not quoted as Go does"):
        tool.stops_in({"parameters": r'stop "\q"'})


@pytest.mark.parametrize(
    ("told", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("example.com", "http://example.com:11434"),
        (":8080", "http://127.0.0.1:8080"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com/ollama/", "https://example.com:443/ollama"),
        ("[::1]:5", "http://[::1]:5"),
        ('"127.0.0.1:1"', "http://127.0.0.1:1"),
    ],
)  # fmt: skip
def test_addresses_are_read_as_ollama_reads_them(
    monkeypatch: pytest.MonkeyPatch, told: str, url: str
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", told)
    assert server_url() == url
    assert server_url(told) == url


@pytest.mark.parametrize("told", ["127.0.0.1:port", "ftp://x", "127.0.0.1:99999"])
def test_no_addresses(told: str) -> None:
    with pytest.raises(RecipeError, match="not the address of a server"):
        tool.server_url(told)
