"""What the front lets through: keys, ways to write a path, answers without a body."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from forge.serve import behind, front_server
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from tests.servers import HELLO, KEY

pytestmark = [pytest.mark.network, pytest.mark.programs]


def _connected(endpoint: Endpoint) -> contextlib.closing[http.client.HTTPConnection]:
    """One connection, which writes a path as it is given."""
    address = urlsplit(endpoint.url).netloc
    return contextlib.closing(http.client.HTTPConnection(address, timeout=30))


@pytest.mark.parametrize(
    ("headers", "held"),
    [
        ({"Authorization": f"Bearer {KEY}"}, True),
        ({"Authorization": KEY}, True),
        ({"X-Api-Key": KEY}, True),
        ({"X-Api-Key": f"Bearer {KEY}"}, True),
        ({"Authorization": "", "X-Api-Key": KEY}, True),
        ({"Authorization": "other", "X-Api-Key": KEY}, True),  # clients of Anthropic's API may send both
        ({"Authorization": f"bearer {KEY}"}, True),  # a scheme's case does not matter (RFC 9110, 11.1)
        ({"Authorization": f"Basic {KEY}"}, False),
        ({"X-Api-Key": KEY + "x"}, False),
        ({"Authorization": "schl\u00fcssel".encode("latin-1")}, False),
        ({}, False),
    ],
)
def test_the_key_is_taken_wherever_clients_send_it(
    served_adapters: Endpoint, headers: dict[str, Any], held: bool
) -> None:
    """An unknown model is refused to whoever is let in, and never answered by the base."""
    url = served_adapters.route("/v1/chat/completions")
    for model, status in {"maybe": 404, "yes": 200}.items():
        body = {"model": model, "messages": HELLO}
        answer = httpx.post(url, json=body, headers=headers, trust_env=False)
        assert answer.status_code == (status if held else 401), model
        if held and status == 200:
            assert answer.json()["choices"][0]["message"]["content"] == "Y"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/chat/completion%73", 404),
        ("/v1/chat%2Fcompletions", 404),
        ("/v1/chat/completions/x/..", 404),
        ("/v1/chat/completions/.", 404),
        ("/v1/chat/completions?x=y", 404),
        ("/v1/chat/completion%u0073", 404),
    ],
)
def test_an_unknown_model_is_refused_however_the_path_is_written(
    served_adapters: Endpoint, path: str, status: int
) -> None:
    body = json.dumps({"model": "maybe", "messages": HELLO})
    with _connected(served_adapters) as asking:
        asking.request("POST", path, body, {"X-Api-Key": KEY})
        assert asking.getresponse().status == status


@pytest.mark.parametrize("command", ["GET", "HEAD"])
def test_an_answer_without_a_body_leaves_the_connection_usable(
    served_adapters: Endpoint, command: str
) -> None:
    """The web page, asked for again by a browser that has it: 304."""
    with _connected(served_adapters) as asking:

        def ask(command: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
            # The page is there compressed alone.
            asking.request(command, path, headers={"Accept-Encoding": "gzip", **headers})
            answer = asking.getresponse()
            return answer, answer.read()

        page, text = ask("GET", "/")
        assert page.status == 200 and text
        has_it = {"If-None-Match": page.headers["ETag"]} if command == "GET" else {}
        bare, nothing = ask(command, "/", **has_it)
        assert (bare.status, nothing) == (304 if command == "GET" else 200, b"")
        assert bare.headers["Transfer-Encoding"] is None
        held = asking.sock
        health, said = ask("GET", "/health")
        assert (health.status, json.loads(said)) == (200, {"status": "ok"})
        assert asking.sock is held, "it had to connect anew"


@pytest.mark.parametrize("status", [204, 304])
def test_what_is_asked_without_the_key_is_not_passed_on(adapter_files: Path, status: int) -> None:
    """The server behind does not hear of it; its bare answers stay bare."""
    heard: list[tuple[str, bytes]] = []

    class Behind(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    settings = ServerSettings(adapter_files / "tiny.gguf", "base", 512, api_key=KEY)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Behind))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        listener = stack.enter_context(front_server.bound(settings))
        front = behind.Behind(f"http://127.0.0.1:{server.server_port}")
        port = stack.enter_context(front_server.opened(listener, settings, front))
        url = f"http://127.0.0.1:{port}/tokenize"
        body = {"content": "a secret"}
        assert httpx.post(url, json=body, trust_env=False).status_code == 401
        answer = httpx.post(url, json=body, headers={"X-Api-Key": KEY}, trust_env=False)
        assert (answer.status_code, answer.content) == (status, b"")
    assert heard == [("/tokenize", b'{"content": "a secret"}')]
