"""The embedded runtime: the real server starts, proves itself, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from forge import process, report
from forge.errors import DataError, ForgeError, MissingToolError, RecipeError, StageError
from forge.model.estimate import SERVER_START_BYTES, Available
from forge.serve import ready
from forge.serve.client import Client
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from forge.serve.slots import slots_for
from forge.serve.wire import GoneError, UnreachableError
from forge.tools import xllamacpp
from tests.servers import HELLO, listens, servers_of
from tests.tiny_gguf import CONTEXT, REPLY, write_tiny_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.mark.network
@pytest.mark.programs
def test_serves_under_its_alias_with_the_routes_of_llama_server(model: Path) -> None:
    """R3, Q1: a chat endpoint, ready when the block is entered; nothing left after it."""
    with serve_embedded(ServerSettings(model, "yoda", 1024, threads=1, parallel=3)) as endpoint:
        assert urlsplit(endpoint.url).hostname == "127.0.0.1"
        with Client(endpoint) as client:
            assert client.model_names() == ["yoda"]
            assert client.chat(HELLO).text == REPLY
            properties = client.properties()
            assert properties["model_alias"] == "yoda"
            # Every slot has the whole context, not a third of it.
            assert (properties["total_slots"], properties["default_generation_settings"]["n_ctx"]) == (
                3,
                1024,
            )
            for route in ("/metrics", "/lora-adapters", "/props", "/"):
                answer = httpx.get(endpoint.route(route), trust_env=False)
                assert answer.status_code == 200, route
        (server,) = servers_of(os.getpid())
    assert not server.is_running()
    assert not listens(endpoint.url)
    with Client(endpoint) as client, pytest.raises(UnreachableError, match="does not answer"):
        client.health()


@pytest.mark.parametrize(("context", "slots"), [(512, 4), (4096, 4), (16384, 2), (131072, 1)])
def test_slots_are_fewer_with_a_long_context(context: int, slots: int) -> None:
    assert ServerSettings(Path("m"), "m", context).slots == slots
    assert ServerSettings(Path("m"), "m", context, parallel=7).slots == 7


@pytest.mark.parametrize(
    ("context", "free_mib", "slots"),
    [(4096, 99_999, 8), (16384, 99_999, 2), (131072, 99_999, 1), (4096, 3, 3), (4096, 0, 1)],
)
def test_many_clients_get_as_many_slots_as_gain_something_and_fit(
    model: Path, monkeypatch: pytest.MonkeyPatch, context: int, free_mib: int, slots: int
) -> None:
    """A slot of 4096 tokens of the tiny model takes a mebibyte; half of the free memory is the server's."""
    taken = model.stat().st_size + SERVER_START_BYTES
    free = 2 * (taken + free_mib * 2**20)
    monkeypatch.setattr("forge.serve.slots.available", lambda: Available(total=free, free=free))
    assert slots_for(ServerSettings(model, "m", context)) == slots


@pytest.mark.network
@pytest.mark.programs
def test_api_key_is_on_no_command_line_and_in_no_log(model: Path, tmp_path: Path) -> None:
    key, log = "open-sesame-1234", tmp_path / "log.txt"
    with serve_embedded(ServerSettings(model, "tiny", 512, threads=1, api_key=key), log=log) as endpoint:
        (server,) = servers_of(os.getpid())
        shown = " ".join(server.cmdline()) + str(server.environ())
        with Client(endpoint) as client:
            client.chat(HELLO)
    text = log.read_text()
    assert "embedded_server" in text
    assert "listening on" in text
    assert key not in shown
    assert "1234" not in text


def test_wrong_files_are_found_before_anything_starts(model: Path, tmp_path: Path) -> None:
    torn, text, empty = (tmp_path / name for name in ("torn.gguf", "text.gguf", "empty.gguf"))
    torn.write_bytes(model.read_bytes()[:-5000])
    text.write_text("this is a text, not a model")
    empty.touch()
    for path in (tmp_path / "none.gguf", torn, text, empty, tmp_path):
        with pytest.raises(DataError, match=path.name):
            with serve_embedded(ServerSettings(path, "m", 512)):
                raise AssertionError("it served")


def test_context_beyond_the_model_is_an_error(model: Path) -> None:
    with pytest.raises(DataError, match=f"{CONTEXT + 1} tokens is asked for.*made for {CONTEXT}") as caught:
        with serve_embedded(ServerSettings(model, "m", CONTEXT + 1)):
            raise AssertionError("it served")
    assert caught.value.hint == f"ask for at most {CONTEXT}"


def test_adapter_is_no_model(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DataError, match="a GGUF of type adapter, not a model"):
        with serve_embedded(ServerSettings(tmp_path / "adapter.gguf", "m", 512)):
            raise AssertionError("it served")


@pytest.mark.network
@pytest.mark.programs
def test_fallback_to_chatml_is_said(model: Path, tmp_path: Path) -> None:
    plain, said = tmp_path / "plain.gguf", io.StringIO()
    plain.write_bytes(model.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatE"))
    with report.copied_to(said), serve_embedded(ServerSettings(plain, "m", 512, threads=1)):
        assert "plain.gguf has no chat template: the server falls back to ChatML" in said.getvalue()


@pytest.mark.network
@pytest.mark.programs
def test_model_that_does_not_load_shows_the_servers_own_words(model: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(model.read_bytes().replace(b"llama", b"lxama"))
    log = tmp_path / "log.txt"
    log.write_text("0.00.000.001 E older: not of this run\n")
    with pytest.raises(StageError, match=r"did not start with .*strange\.gguf") as caught:
        with serve_embedded(ServerSettings(strange, "m", 512, threads=1), log=log):
            raise AssertionError("it served")
    lines = [problem.message for problem in caught.value.problems]
    assert any("unknown model architecture: 'lxama'" in line for line in lines)
    assert not any("older" in line for line in lines)
    assert not servers_of(os.getpid())


@pytest.mark.network
@pytest.mark.programs
def test_port_in_use_is_said(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StageError) as caught:
            with serve_embedded(ServerSettings(model, "m", 512, threads=1, port=taken.getsockname()[1])):
                raise AssertionError("it served")
    assert "cannot be listened on" in caught.value.message


@pytest.mark.network
@pytest.mark.programs
def test_server_that_dies_is_named_with_its_last_lines(model: Path, tmp_path: Path) -> None:
    with serve_embedded(ServerSettings(model, "m", 512, threads=1), log=tmp_path / "log") as endpoint:
        (server,) = servers_of(os.getpid())
        server.kill()
        with Client(endpoint) as client:
            with pytest.raises(GoneError, match="killed by signal 9") as caught:
                client.chat(HELLO)
    assert "listening on unix://" in caught.value.message


SERVE = """
import sys, time
from pathlib import Path
from forge import process, report
from forge.serve.embedded import serve_embedded
from forge.serve.runtime import ServerSettings
host = sys.argv[2] if sys.argv[2:] else "127.0.0.1"
settings = ServerSettings(Path(sys.argv[1]), "m", 512, threads=1, host=host, without_key=True)
with process.signals_as_interrupt(), serve_embedded(settings) as endpoint:
    print(endpoint.url, flush=True)
    time.sleep(60)
"""


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_parent(model: Path, number: signal.Signals) -> None:
    """However the parent ends: no child, no port."""
    with process.Child([sys.executable, "-c", SERVE, str(model)]) as parent:
        url = next(parent.lines())
        assert listens(url)
        servers = servers_of(parent.pid)
        assert len(servers) == 1
        os.kill(parent.pid, number)
        parent.wait(10)
        _, alive = psutil.wait_procs(servers, timeout=5)
        assert not alive
        deadline = time.monotonic() + 5
        while listens(url) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not listens(url)


@pytest.mark.network
@pytest.mark.programs
def test_other_hosts(model: Path) -> None:
    """Pitfall 57: bound to every address, the client still gets one that it can use."""
    said = io.StringIO()
    everywhere = ServerSettings(model, "m", 512, threads=1, host="0.0.0.0")
    with pytest.raises(RecipeError, match="others than this machine could use the server") as caught:
        with serve_embedded(everywhere):
            raise AssertionError("it served")
    assert "--api-key-file" in caught.value.hint
    ready.check_settings(replace(everywhere, api_key="k"))
    # In a process of its own: this one may not listen to others.
    with process.Child([sys.executable, "-c", SERVE, str(model), "0.0.0.0"]) as child:
        url = next(line for line in child.lines() if line.startswith("http"))
        assert urlsplit(url).hostname == "127.0.0.1"
        with Client(Endpoint(url, "m")) as client:
            assert client.health()
    with report.copied_to(said):
        ready.check_settings(replace(everywhere, without_key=True))
    assert "it has no API key" in said.getvalue()
    with serve_embedded(ServerSettings(model, "m", 512, threads=1, host="localhost")) as endpoint:
        assert endpoint.loopback


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.parametrize(("asked", "allowed"), [("", []), ("localhost", ["http://localhost:3000"])])
def test_web_pages_of_others_may_not_ask_unless_told(model: Path, asked: str, allowed: list[str]) -> None:
    """CORS is closed, with a key and without."""
    origins = ("http://evil.example", "http://localhost:3000", "null")
    for key in ("k", None):
        wish = ServerSettings(model, "m", 512, threads=1, api_key=key, cors_origins=asked)
        with serve_embedded(wish) as endpoint:
            answers = [
                httpx.get(endpoint.route("/health"), headers={"Origin": origin}, trust_env=False)
                for origin in origins
            ]
        found = [answer.headers.get("access-control-allow-origin") for answer in answers]
        assert [origin for origin in found if origin] == allowed


@pytest.mark.network
@pytest.mark.programs
def test_layers_on_a_gpu_that_is_not_there_are_refused(model: Path) -> None:
    """A flag that cannot be honoured is refused; the wheel has no GPU code."""
    for layers in (-1, 5):
        with pytest.raises(RecipeError, match="runs on the CPU only"):
            with serve_embedded(ServerSettings(model, "m", 512, threads=1, gpu_layers=layers)):
                raise AssertionError("it served")
    with serve_embedded(ServerSettings(model, "m", 512, threads=1, gpu_layers=0)) as endpoint:
        assert endpoint.device == "CPU"
        changed = httpx.post(endpoint.route("/props"), json={"chat_template": "x"}, trust_env=False)
        assert changed.status_code == 403, "clients may not change the server"


@pytest.mark.network
@pytest.mark.programs
def test_asking_whether_a_living_server_has_ended_takes_no_time(model: Path) -> None:
    """`forge serve` asks all day long."""
    with serve_embedded(ServerSettings(model, "m", 512, threads=1)) as endpoint:
        begun = time.monotonic()
        assert endpoint.why_gone() == ""
        assert time.monotonic() - begun < 0.5


def test_processor_without_the_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse4_2 avx f16c\nflags\t\t: fpu\n")
    with pytest.raises(MissingToolError, match="lacks avx2, fma, which"):
        xllamacpp.check_processor(cpuinfo)
    cpuinfo.write_text("processor\t: 0\nflags\t\t: avx2 fma f16c\n")
    xllamacpp.check_processor(cpuinfo)
    xllamacpp.check_processor(tmp_path / "no such file")


def test_missing_package_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingToolError, match="xllamacpp") as caught:
        with serve_embedded(ServerSettings(model, "m", 512, threads=1)):
            raise AssertionError("it served")
    assert caught.value.hint == "pip install xllamacpp"
    assert caught.value.code == 3


@pytest.mark.network
def test_endpoint_without_a_child_knows_no_end() -> None:
    with Client(Endpoint("http://127.0.0.1:9", "m")) as client, pytest.raises(ForgeError) as caught:
        client.health()
    assert type(caught.value) is UnreachableError
