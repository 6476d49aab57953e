"""docker/front.conf, in a real nginx before real servers: nothing is held back, and nothing lost."""

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
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from forge import process
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint
from forge.serve.front_nginx import front_conf
from forge.serve.runtime import ServerSettings
from forge.serve.wire import Sampling
from tests import attacks
from tests.conftest import ROOT
from tests.servers import HELLO, KEY, bare_server, write_adapter
from tests.shipping import wait_for
from tests.stand_in_server import Failure, StandIn
from tests.tiny_gguf import REPLY, write_tiny_gguf

SHIPPED = (ROOT / "docker" / "front.conf").read_text()
pytestmark = [pytest.mark.network, pytest.mark.programs, pytest.mark.slow]


@contextlib.contextmanager
def _behind_nginx(place: Path, servers: Sequence[Endpoint], text: str = SHIPPED) -> Iterator[Endpoint]:
    """The shipped configuration in a real nginx."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("needs nginx: apt-get install nginx")
    pid = place / "nginx.pid"
    with (place / "nginx.log").open("a+") as log, contextlib.ExitStack() as stack:
        for is_last in (False, True):
            pid.unlink(missing_ok=True)
            port = _free_port()
            command = [nginx, "-p", str(place), "-c", str(_written(place, port, servers, text))]
            child = stack.enter_context(process.Child(command, log=log, separate_errors=True))
            try:
                # It writes that once it listens; that anybody does would prove nothing.
                wait_for("nginx", pid.exists, child)
                break
            except AssertionError:
                # Another program has taken the port since it was free.
                if is_last or child.status is None:
                    raise
        yield replace(servers[0], url=f"http://127.0.0.1:{port}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _written(place: Path, port: int, servers: Sequence[Endpoint], text: str) -> Path:
    """nginx's configuration as it is shipped, but for where it listens, writes, and finds the servers."""
    named = "".join(rf"server {urlsplit(one.url).netloc}\1;" for one in servers)
    for pattern, new in {
        r"resolver [^;]+;": "",
        r"server server:8080 resolve([^;]*);": named,
        r"worker_processes 2;": "daemon off; worker_processes 1;" + ("" if os.getuid() else "user root;"),
    }.items():
        text, count = re.subn(pattern, new, text)
        assert count == 1, pattern
    text = text.replace("listen 8080", f"listen 127.0.0.1:{port}").replace(" /tmp/", f" {place}/")
    main = place / "nginx.conf"
    main.write_text(text)
    return main


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    """Its answers end by their length alone, so that there is time to kill who gives them."""
    model = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", endless=True)
    return ServerSettings(model, "yoda", 4096, threads=1, parallel=4)


def test_requests_outlive_the_server_that_answers_them(settings: ServerSettings, tmp_path: Path) -> None:
    """Killed while it answers: another server is asked, and whoever waits sees nothing but the answer."""
    long = Sampling(max_tokens=3000)
    with bare_server(settings) as (first, _), bare_server(settings) as (second, victim):
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
    with bare_server(ServerSettings(model, "yoda", 512, threads=1, parallel=1)) as (server, _):
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


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "key"])
def test_the_front_door_of_compose_withstands(tmp_path: Path, key: str | None) -> None:
    """The attacks of `test_serve_front`, on nginx with the rules that were written from the same settings."""
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    own = write_adapter(tmp_path / "Y.gguf", says="Y")
    settings = ServerSettings(model, "yes", 512, threads=1, parallel=2, adapter=own, api_key=key)
    with bare_server(settings) as (server, _), _behind_nginx(tmp_path, [server]) as endpoint:
        attacks.page_of_another_site_changes_nothing(endpoint, "Y")
        attacks.what_controls_is_closed(endpoint, "Y")
        attacks.other_names_are_not_answered(endpoint)
        attacks.slow_clients_hold_up_nobody(endpoint, "Y", count=300)
        attacks.smuggled_requests_are_not_run(endpoint)
        attacks.answers_as(endpoint, "Y")
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=endpoint.url, headers=headers if key else {}, trust_env=False) as http:
            for path in ("/nothing", "/slots", "/v1/models/no", "/v1/stream"):
                answer = http.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)
            assert "no such route" not in http.get("/").text, "the page is the server's"
            assert http.get("/v1/models").json()["data"][0]["id"] == "yes"
            assert http.post("/tokenize", json={"content": "a lora b"}).status_code == 200


def test_pages_and_names_that_are_let_in(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    settings = ServerSettings(
        model, "m", 512, threads=1, cors_origins="https://a.example", allow_hosts=("chat.example",),
        control_routes=True,
    )  # fmt: skip
    text = front_conf(settings, upstream="server:8080 resolve", resolver="127.0.0.11")
    with bare_server(settings) as (server, _), _behind_nginx(tmp_path, [server], text) as endpoint:
        with httpx.Client(base_url=endpoint.url, trust_env=False) as http:
            assert http.get("/health", headers={"Host": "chat.example"}).status_code == 200
            assert http.get("/health", headers={"Host": "other.example"}).status_code == 403
            page = {"Origin": "https://a.example"}
            answer = http.post("/v1/chat/completions", json={"messages": HELLO}, headers=page)
            assert answer.headers["access-control-allow-origin"] == page["Origin"]
            asking = page | {"Access-Control-Request-Headers": "content-type"}
            preflight = http.options("/v1/chat/completions", headers=asking)
            assert preflight.headers["access-control-allow-headers"] == "content-type"
            assert http.post("/tokenize", json={}, headers={"Origin": "https://b.example"}).status_code == 403
            assert http.post("/tokenize", json={"content": "a"}, headers={"Origin": endpoint.url}).is_success
            assert http.get("/slots").status_code == 200
            assert http.get("/v1/models/m").json()["id"] == "m"
