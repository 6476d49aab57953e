"""docker/replicas.conf, in a real nginx before real servers: nothing is held back, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from forge import process
from forge.serve.client import Client
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from forge.serve.wire import Sampling
from tests.conftest import ROOT
from tests.servers import HELLO, own_servers
from tests.shipping import wait_for
from tests.stand_in_server import Failure, StandIn
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs, pytest.mark.slow]
_MAIN = """
{user}
daemon off;
pid {place}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    include {place}/replicas.conf;
}}
"""


@contextlib.contextmanager
def _behind_nginx(place: Path, servers: Sequence[Endpoint]) -> Iterator[Endpoint]:
    """The shipped configuration but for two things: where it listens, and docker's name for the servers."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("needs nginx: apt-get install nginx")
    pid = place / "pid"
    with (place / "nginx.log").open("a+") as log, contextlib.ExitStack() as stack:
        for is_last in (False, True):
            pid.unlink(missing_ok=True)
            port = _free_port()
            command = [nginx, "-p", str(place), "-c", str(_written(place, port, servers))]
            child = stack.enter_context(process.Child(command, log=log, separate_errors=True))
            try:
                # It writes that once it listens; that anybody does would prove nothing.
                wait_for("nginx", pid.exists, child)
                break
            except AssertionError:
                # Another program has taken the port since it was free.
                if is_last or child.status is None:
                    raise
        yield Endpoint(f"http://127.0.0.1:{port}", servers[0].model)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _written(place: Path, port: int, servers: Sequence[Endpoint]) -> Path:
    """nginx's configuration."""
    text = (ROOT / "docker" / "replicas.conf").read_text()
    named = "".join(rf"server {urlsplit(one.url).netloc}\1;" for one in servers)
    for pattern, new in {
        r"resolver [^;]+;": "",
        r"server server:8080 resolve([^;]*);": named,
        r"listen 8080;": f"listen 127.0.0.1:{port};",
    }.items():
        text, count = re.subn(pattern, new, text)
        assert count == 1, pattern
    (place / "replicas.conf").write_text(text)
    main = place / "nginx.conf"
    main.write_text(_MAIN.format(place=place, user="" if os.getuid() else "user root;"))
    return main


@contextlib.contextmanager
def _server(settings: ServerSettings) -> Iterator[tuple[Endpoint, psutil.Process]]:
    before = set(own_servers())
    with serve_embedded(settings) as endpoint:
        [process_] = set(own_servers()) - before
        yield endpoint, process_


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    """Its answers end by their length alone, so that there is time to kill who gives them."""
    model = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", endless=True)
    return ServerSettings(model, "yoda", 4096, threads=1, parallel=4)


def test_requests_outlive_the_server_that_answers_them(settings: ServerSettings, tmp_path: Path) -> None:
    """Killed while it answers: another server is asked, and whoever waits sees nothing but the answer."""
    long = Sampling(max_tokens=3000)
    with _server(settings) as (first, _), _server(settings) as (second, victim):
        with _behind_nginx(tmp_path, [first, second]) as endpoint:

            def ask(number: int) -> tuple[str, int]:
                with Client(endpoint) as client:
                    reply = client.chat([{"role": "user", "content": f"Hello {number}"}], long)
                return reply.finish_reason, reply.completion_tokens

            def answers() -> int:
                slots = httpx.get(second.route("/slots"), trust_env=False).json()
                return sum(slot["is_processing"] for slot in slots)

            with ThreadPoolExecutor(8) as asking:
                asked = [asking.submit(ask, number) for number in range(8)]
                deadline = time.monotonic() + 30
                while answers() < 2:
                    assert time.monotonic() < deadline
                victim.kill()
                assert [one.result() for one in asked] == [("length", 3000)] * 8
            # It is gone for good: nobody notices.
            with Client(endpoint) as client:
                for _ in range(10):
                    assert client.chat(HELLO, Sampling(max_tokens=4)).completion_tokens == 4


def test_streams_pass_as_they_come_and_idle_connections_live(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    with serve_embedded(ServerSettings(model, "yoda", 512, threads=1, parallel=1)) as server:
        patient = httpx.Client(trust_env=False, limits=httpx.Limits(keepalive_expiry=60))
        with _behind_nginx(tmp_path, [server]) as endpoint, patient as http:
            body = {"messages": HELLO, "stream": True, "temperature": 0}
            for pause in (0.0, 0.0, 7.0):
                # One connection to nginx, also after llama-server would have closed an idle one (5 s).
                time.sleep(pause)
                answer = http.post(endpoint.route("/v1/chat/completions"), json=body)
                assert answer.is_success and answer.text.rstrip().endswith("data: [DONE]")
                with Client(endpoint) as client:
                    assert "".join(client.stream_chat(HELLO)) == REPLY
    hold = threading.Event()
    with StandIn(hold=hold) as slow, _behind_nginx(tmp_path, [slow.endpoint]) as endpoint:
        with Client(endpoint) as client:
            pieces = client.stream_chat([{"role": "user", "content": "one two"}])
            begun = time.monotonic()
            assert next(pieces) == "ONE "
            assert time.monotonic() - begun < 10, "the first word waited for the second"
            hold.set()
            assert "".join(pieces) == "TWO "


@pytest.mark.parametrize("failure", [Failure(503, "Loading model"), Failure(0)], ids=["loads", "breaks off"])
def test_a_server_that_cannot_answer_is_passed_over(tmp_path: Path, failure: Failure) -> None:
    with StandIn(failures=[failure] * 100) as away, StandIn() as there:
        with _behind_nginx(tmp_path, [away.endpoint, there.endpoint]) as endpoint, Client(endpoint) as client:
            for _ in range(20):
                assert client.chat([{"role": "user", "content": "hello"}]).text == "HELLO "
        assert away.asked and len(there.asked) == 20
        with _behind_nginx(tmp_path, [away.endpoint]) as endpoint:
            # Nobody else is there: the client hears so, and may try again.
            url = endpoint.route("/v1/chat/completions")
            answer = httpx.post(url, json={"messages": HELLO}, trust_env=False, timeout=60)
            assert answer.status_code in (502, 503)
