"""The llama-server runtime: a real binary starts, proves itself, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from forge import process
from forge.errors import MissingToolError, RecipeError, StageError
from forge.serve.client import Client
from forge.serve.llama_server import serve_llama_server
from forge.serve.runtime import ServerSettings
from forge.serve.runtimes import RUNTIMES, refuse_foreign, runtime_for
from forge.serve.wire import GoneError
from tests.servers import HELLO, listens, llama_server, own_servers, servers_of, write_adapter
from tests.tiny_gguf import REPLY, write_tiny_gguf


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    model = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
    return ServerSettings(model, "yoda", 1024, threads=1, parallel=2)


@pytest.fixture
def compiled(settings: ServerSettings) -> ServerSettings:
    return replace(settings, program=str(llama_server()))


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_serves_with_the_key_nowhere_to_be_seen(compiled: ServerSettings, tmp_path: Path) -> None:
    key, log = "open-sesame-1234", tmp_path / "log.txt"
    with serve_llama_server(replace(compiled, api_key=key), log=log) as endpoint:
        with Client(endpoint) as client:
            assert client.model_names() == ["yoda"]
            assert client.chat(HELLO).text == REPLY
            properties = client.properties()
            assert properties["total_slots"] == 2
            assert properties["default_generation_settings"]["n_ctx"] == 1024
        (server,) = own_servers()
        shown = " ".join(server.cmdline()) + str(server.environ())
        assert "llama-server" in shown
        assert key not in shown
        assert endpoint.device == "CPU"
    assert not listens(endpoint.url)
    assert not own_servers()
    assert key not in log.read_text()
    assert "listening on" in log.read_text()


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_what_follows_a_stream_is_answered(compiled: ServerSettings) -> None:
    """The server closes the connection after a stream, now and then before the next request is out."""
    with serve_llama_server(compiled) as endpoint, Client(endpoint) as client:
        for _ in range(60):
            assert "".join(client.stream_chat(HELLO)) == REPLY
            assert client.health()


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_adapters_by_name(compiled: ServerSettings, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "yes.gguf", says="Y")
    with serve_llama_server(replace(compiled, adapters={"yes": adapter})) as endpoint:
        with Client(endpoint) as client, Client(replace(endpoint, model="yes")) as other:
            assert (client.chat(HELLO).text, other.chat(HELLO).text) == (REPLY, "Y")


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_what_goes_wrong_is_told_in_its_own_words(compiled: ServerSettings, tmp_path: Path) -> None:
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(compiled.model.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(StageError, match=r"did not start with .*strange\.gguf") as caught:
        with serve_llama_server(replace(compiled, model=strange)):
            raise AssertionError("it served")
    assert any("unknown model architecture: 'lxama'" in one.message for one in caught.value.problems)
    with serve_llama_server(compiled) as endpoint:
        (server,) = own_servers()
        server.kill()
        with Client(endpoint) as client, pytest.raises(GoneError, match="killed by signal 9"):
            client.chat(HELLO)
    with pytest.raises(RecipeError, match="runs on the CPU only"):
        with serve_llama_server(replace(compiled, gpu_layers=5)):
            raise AssertionError("it served")
    assert not own_servers()


SERVE = """
import sys, time
from pathlib import Path
from forge import process
from forge.serve.llama_server import serve_llama_server
from forge.serve.runtime import ServerSettings
settings = ServerSettings(Path(sys.argv[1]), "m", 512, threads=1, program=sys.argv[2])
with process.signals_as_interrupt(), serve_llama_server(settings) as endpoint:
    print(endpoint.url, flush=True)
    time.sleep(60)
"""


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_parent(compiled: ServerSettings, number: signal.Signals) -> None:
    command = [sys.executable, "-c", SERVE, str(compiled.model), str(compiled.program)]
    with process.Child(command) as parent:
        url = next(parent.lines())
        servers = servers_of(parent.pid)
        os.kill(parent.pid, number)
        parent.wait(20)
        for server in servers:
            server.wait(10)
    assert not listens(url)


def test_missing_program_is_named(settings: ServerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingToolError, match="there is no program llama-server") as caught:
        with serve_llama_server(settings):
            raise AssertionError("it served")
    assert "--llama-server" in caught.value.hint


def test_names_of_runtimes_and_their_own_settings(settings: ServerSettings) -> None:
    for name in RUNTIMES:
        assert callable(runtime_for(name))
    with pytest.raises(RecipeError, match="there is no runtime vllm") as caught:
        runtime_for("vllm")
    assert "embedded, llama-server, container" in caught.value.hint
    with pytest.raises(RecipeError, match="embedded has no image to choose"):
        refuse_foreign("embedded", replace(settings, image="x"))
    with pytest.raises(RecipeError, match="container has no program to choose"):
        refuse_foreign("container", replace(settings, program="x"))
    refuse_foreign("llama-server", replace(settings, program="x"))
