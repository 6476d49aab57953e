"""Adapters by name: the model of a request chooses, streamed or not, and everything else goes through."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from forge.errors import DataError, StageError
from forge.serve.client import Client
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from forge.serve.wire import RefusedError
from tests.attacks import raw, statuses
from tests.servers import HELLO, KEY, write_adapter
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]


def _named(endpoint: Endpoint, model: str) -> Endpoint:
    return Endpoint(endpoint.url, model, KEY)


@pytest.mark.parametrize(("model", "answer"), [("base", REPLY), ("yes", "Y"), ("no", "N")])
def test_model_chooses_the_adapter(served_adapters: Endpoint, model: str, answer: str) -> None:
    with Client(_named(served_adapters, model)) as client:
        for _ in range(2):
            assert client.chat(HELLO).text == answer
            assert "".join(client.stream_chat(HELLO)) == answer


def test_a_route_that_chooses_no_adapter_is_the_models_own(served_adapters: Endpoint) -> None:
    """llama-server makes a body of its own out of Anthropic's: with every adapter on, were they not off."""
    body = {"messages": HELLO, "max_tokens": 32, "temperature": 0}
    with httpx.Client(base_url=served_adapters.url, headers={"X-Api-Key": KEY}, trust_env=False) as http:
        for model in ({"model": "base"}, {}):
            answer = http.post("/v1/messages", json={**body, **model}).json()
            assert answer["content"][0]["text"] == REPLY
        for path in ("/v1/messages", "/v1/embeddings"):
            refused = http.post(path, json={**body, "input": "a", "model": "no"})
            assert refused.status_code == 400
            assert "answered by base only; ask no by /v1/chat/completions" in refused.text


def test_many_at_once_do_not_mix(served_adapters: Endpoint) -> None:
    said: list[tuple[str, str]] = []

    def ask(model: str) -> None:
        with Client(_named(served_adapters, model)) as client:
            said.extend((model, client.chat(HELLO).text) for _ in range(5))

    threads = [threading.Thread(target=ask, args=(model,)) for model in ("base", "yes", "no") * 2]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(set(said)) == [("base", REPLY), ("no", "N"), ("yes", "Y")]
    assert len(said) == 30


def test_models_are_listed_and_unknown_ones_refused(served_adapters: Endpoint) -> None:
    with Client(_named(served_adapters, "maybe")) as client:
        assert client.model_names() == ["base", "yes", "no"]
        with pytest.raises(RefusedError, match="no model 'maybe'; served are base, yes, no"):
            client.chat(HELLO)
    for name in ("yes", "maybe"):
        with Client(Endpoint(served_adapters.url, name, "wrong")) as client:
            with pytest.raises(RefusedError, match="Invalid API Key") as refused:
                client.chat(HELLO)
            assert "no" not in str(refused.value).split(), "the names are told without the key"
    with Client(Endpoint(served_adapters.url, "yes", "wrong")) as client:
        with pytest.raises(RefusedError, match="Invalid API Key"):
            client.chat(HELLO)
        with pytest.raises(RefusedError, match="Invalid API Key"):
            client.model_names()


def test_everything_else_goes_through(served_adapters: Endpoint) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served_adapters.url, headers=headers, trust_env=False) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert "<html" in http.get("/").text.lower()
        assert "llamacpp:" in http.get("/metrics").text
        assert http.post("/tokenize", json={"content": "abc"}).json() == {"tokens": [69, 70, 71]}
        assert http.get("/nothing").status_code == 404
        torn = http.post("/v1/chat/completions", content=b'{"messages": [')
        assert torn.status_code == 400 or torn.status_code == 500
        assert "error" in torn.json()
        assert http.head("/health").status_code == 200


@pytest.mark.parametrize("target", ["@127.0.0.1:{port}/secret", "http://127.0.0.1:{port}/secret", "/a\x01b"])
def test_no_request_reaches_another_host(served_adapters: Endpoint, target: str) -> None:
    """Security: the proxy asks its own server and nobody else."""
    with socket.socket() as other, socket.socket() as asking:
        other.bind(("127.0.0.1", 0))
        other.listen()
        other.settimeout(0.5)
        line = f"GET {target.format(port=other.getsockname()[1])} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        address = urlsplit(served_adapters.url)
        asking.connect((address.hostname, address.port))
        asking.sendall(line.encode())
        assert asking.recv(100).startswith(b"HTTP/1.1 4")
        with pytest.raises(TimeoutError):
            other.accept()


def _raw(endpoint: Endpoint, request: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to the bytes of a request."""
    answer = raw(endpoint, request)
    [status] = statuses(answer)
    return status, answer.partition(b"\r\n\r\n")[2]


_KEY_LINE = f"Authorization: Bearer {KEY}\r\n".encode()
_POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + _KEY_LINE


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 505),
        (b"GET\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", 431),
        (b"GET /[x HTTP/1.1\r\nX: a\x00b\r\nConnection: close\r\n\r\n", 400),
        (_POST + b"Content-Length: -1\r\n\r\n", 400),
        (_POST + b"Content-Length: " + b"9" * 15 + b"\r\n\r\n", 413),
        (_POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415),
        (_POST + _KEY_LINE + b"Content-Length: 2\r\n\r\n{}", 400),
        (_POST + b"Content-Type: application/json\r\nContent-Type: text/plain\r\n\r\n", 400),
        (_POST + b"Content-Length: 50000\r\n\r\n" + b"[" * 50_000, 400),
        (_POST + b"Content-Length: 12\r\n\r\n" + b'{"model": 7}', 404),
        (_POST + b"Content-Length: 13\r\n\r\n" + b'{"model": []}', 404),
    ],
)
def test_what_is_no_request_gets_an_error_in_openais_shape(
    served_adapters: Endpoint, request_bytes: bytes, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    found, body = _raw(served_adapters, request_bytes)
    assert found == status
    error = json.loads(body)["error"]
    assert error["code"] == status and error["message"]
    assert "Traceback" not in capfd.readouterr().err


def test_headers_go_through_byte_for_byte_and_http_1_0_gets_no_chunks(served_adapters: Endpoint) -> None:
    body = json.dumps({"model": "yes", "messages": HELLO}).encode()
    head = _POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"X-Name: Gr\xfc\xdfe\r\n"
    status, answer = _raw(served_adapters, head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert status == 200
    assert json.loads(answer)["choices"][0]["message"]["content"] == "Y"


def test_dropped_connections_leave_no_traceback(
    served_adapters: Endpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    address = urlsplit(served_adapters.url)
    for request in (b"", b"GET /he", _POST + b"Content-Length: 100\r\n\r\n{"):
        asking = socket.create_connection((address.hostname or "", address.port or 0))
        asking.sendall(request)
        # A reset, not an orderly end.
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        asking.close()
    with Client(_named(served_adapters, "yes")) as client:
        assert client.chat(HELLO).text == "Y"
    assert "Traceback" not in capfd.readouterr().err


def test_who_goes_away_stops_the_answer(adapter_files: Path, tmp_path: Path) -> None:
    endless = write_tiny_gguf(tmp_path / "endless.gguf", endless=True)
    settings = ServerSettings(endless, "base", 4096, threads=1, parallel=1, control_routes=True)
    with serve_embedded(replace(settings, adapters={"yes": adapter_files / "Y.gguf"})) as endpoint:
        with Client(endpoint) as client:
            answer = client.stream_chat(HELLO)
            assert next(answer)
            answer.close()
            slots: list[dict[str, Any]] = [{"is_processing": True}]
            deadline = time.monotonic() + 30
            while slots[0]["is_processing"] and time.monotonic() < deadline:
                slots = httpx.get(endpoint.route("/slots"), trust_env=False).json()
            assert not slots[0]["is_processing"]


def test_a_body_in_chunks_is_one_body(served_adapters: Endpoint) -> None:
    """Node's fetch sends what it streams so; what is too large is refused while it comes."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    pieces = json.dumps({"model": "yes", "messages": HELLO}).encode()
    url = served_adapters.route("/v1/chat/completions")
    answer = httpx.post(url, content=iter([pieces[:9], pieces[9:]]), headers=headers, trust_env=False)
    assert answer.json()["choices"][0]["message"]["content"] == "Y"
    endless = (b"x" * (1 << 20) for _ in range(80))
    with contextlib.suppress(httpx.TransportError):
        assert httpx.post(url, content=endless, headers=headers, trust_env=False).status_code == 413


def test_wrong_adapters_and_a_taken_port_are_said(adapter_files: Path, tmp_path: Path) -> None:
    settings = ServerSettings(adapter_files / "tiny.gguf", "base", 512, threads=1)
    with pytest.raises(DataError, match=r"tiny\.gguf: a model, not an adapter"):
        with serve_embedded(replace(settings, adapters={"x": adapter_files / "tiny.gguf"})):
            raise AssertionError("it served")
    other = write_adapter(tmp_path / "gemma.gguf", says="N", architecture="gemma")
    with pytest.raises(DataError, match="for the architecture gemma, the model's is llama"):
        with serve_embedded(replace(settings, adapters={"x": other})):
            raise AssertionError("it served")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wish = ServerSettings(adapter_files / "tiny.gguf", "base", 512, threads=1, port=port)
        with pytest.raises(StageError, match=f"127.0.0.1:{port} cannot be listened on"):
            with serve_embedded(replace(wish, adapters={"yes": adapter_files / "Y.gguf"})):
                raise AssertionError("it served")
