"""What a hostile page, a hostile neighbour and a broken client send, for every runtime's front door.

Each function asks a real server over a real socket and asserts that it is refused, and harmless.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

from forge.serve.client import Client
from forge.serve.endpoint import Endpoint
from forge.serve.wire import Sampling

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
# Routes that a page or a neighbour must not reach, and what it would send there.
CLOSED = (
    ("POST", "/lora-adapters", b'[{"id":0,"scale":0}]'),
    ("POST", "/props", b'{"chat_template":"x"}'),
    ("GET", "/slots", b""),
    ("POST", "/slots/0?action=erase", b""),
)


def connect(endpoint: Endpoint) -> socket.socket:
    address = urlsplit(endpoint.url)
    return socket.create_connection((address.hostname or "", address.port or 0), timeout=30)


def head(endpoint: Endpoint, method: str = "POST", path: str = CHAT, *more: str) -> bytes:
    """The head of a request that the server would answer, without the empty line at its end."""
    key = [f"Authorization: Bearer {endpoint.api_key}"] if endpoint.api_key else []
    host = urlsplit(endpoint.url).netloc
    return "".join(
        f"{line}\r\n" for line in (f"{method} {path} HTTP/1.1", f"Host: {host}", *key, *more)
    ).encode()


def raw(endpoint: Endpoint, request: bytes) -> bytes:
    """All that is answered to these bytes until the server closes, or has been silent for two seconds."""
    answer = b""
    with (
        connect(endpoint) as asking,
        contextlib.suppress(ConnectionResetError, BrokenPipeError, TimeoutError),
    ):
        asking.settimeout(2)
        asking.sendall(request)
        while piece := asking.recv(65536):
            answer += piece
    return answer


def statuses(answer: bytes) -> list[int]:
    """The status of every answer on a connection: a smuggled request has one of its own."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def answers_as(endpoint: Endpoint, expected: str) -> None:
    """An honest client is answered, by the model that it asked for, and health is too."""
    begun = time.monotonic()
    assert httpx.get(endpoint.route("/health"), trust_env=False, timeout=5).json() == {"status": "ok"}
    with Client(endpoint) as client:
        assert client.chat(HELLO, Sampling(max_tokens=32)).text == expected
    assert time.monotonic() - begun < 20


def page_of_another_site_changes_nothing(endpoint: Endpoint, expected: str) -> None:
    """A form or `fetch` of any page: text/plain needs no permission of the browser."""
    key = [f"Authorization: Bearer {endpoint.api_key}"] if endpoint.api_key else []
    for method, path, body in (*CLOSED, ("POST", CHAT, json.dumps({"messages": HELLO}).encode())):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json", ""):
            for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
                lines = [f"Origin: {origin}", f"Content-Length: {len(body)}", *key]
                lines += [f"Content-Type: {kind}"] if kind else []
                answer = raw(
                    endpoint, head(endpoint, method, path, "Connection: close", *lines) + b"\r\n" + body
                )
                assert statuses(answer) == [403] or statuses(answer) == [400], (path, kind, answer[:200])
                assert b"access-control-allow-origin" not in answer.lower()
    answers_as(endpoint, expected)


def what_controls_is_closed(endpoint: Endpoint, expected: str) -> None:
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    with httpx.Client(base_url=endpoint.url, headers=headers, trust_env=False) as http:
        for method, path, body in CLOSED:
            answer = http.request(method, path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (403, 404), (path, answer.text)
            assert isinstance(answer.json()["error"]["message"], str)
        for lora in ([], [{"id": 0, "scale": 0}], None):
            answer = http.post(CHAT, json={"messages": HELLO, "lora": lora})
            assert answer.status_code == 400, answer.text
        escaped = json.dumps({"messages": HELLO, "lora": [{"id": 0, "scale": 0}]}).replace(
            "lora", "l\\u006Fr\\u0061"
        )
        answer = http.post(CHAT, content=escaped, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
    answers_as(endpoint, expected)


def other_names_are_not_answered(endpoint: Endpoint) -> None:
    """DNS rebinding: a page of evil.example whose name has become our address."""
    own = urlsplit(endpoint.url).netloc.encode()
    for path in ("/health", "/v1/models", "/props", "/", "/metrics"):
        for name in (
            b"evil.example",
            b"evil.example:8080",
            b"127.0.0.1.evil.example",
            b"127.0.0.1@evil.example",
        ):
            request = head(endpoint, "GET", path, "Connection: close").replace(own, name, 1) + b"\r\n"
            answer = raw(endpoint, request)
            assert statuses(answer)[0] in (400, 403, 421), (path, name, answer[:200])
            assert b"evil" not in answer.split(b"\r\n\r\n")[0]
            assert b"llama" not in answer.lower() or b"evil" in answer
    for hosts in ([], ["Host: localhost", "Host: evil.example"]):
        lines = ["GET /v1/models HTTP/1.1", *hosts, "Connection: close", "", ""]
        assert statuses(raw(endpoint, "\r\n".join(lines).encode())) == [400]


def smuggled_requests_are_not_run(endpoint: Endpoint) -> None:
    """Two readings of one request: the second part must never be answered by itself."""
    hidden = b"GET /props HTTP/1.1\r\nHost: localhost\r\n\r\n"
    body = b"{}"
    size = len(hidden)
    for lines in (
        ["No colon at all", f"Content-Length: {size}"],
        ["X-A : b", f"Content-Length: {size}"],
        [f"Content-Length : {size}"],
        ["Content-Length: 2", f"Content-Length: {size}"],
        [f"Content-Length: {size}", "Content-Length: 2"],
        [f"Content-Length: 2, {size}"],
        [f"Content-Length: +{size}"],
        ["Content-Length: 0x2"],
        ["Content-Length: -1"],
        [f"Content-Length: {size}", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding : chunked"],
        ["X-B: y", " folded: x", f"Content-Length: {size}"],
        ["X-A: b\rContent-Length: 0", f"Content-Length: {size}"],
        ["X\x00: b", f"Content-Length: {size}"],
    ):
        answer = raw(endpoint, head(endpoint, "POST", CHAT, *lines) + b"\r\n" + body + hidden)
        assert len(statuses(answer)) <= 1, (lines, answer[:400])
        assert statuses(answer)[:1] in ([], [400], [408], [411], [413], [415], [501]), (lines, answer[:200])
        assert b"default_generation_settings" not in answer, lines
    for lines in (["GET /health HTTP/1.1 x"], ["GET  /health HTTP/1.1"], ["GET /health HTTP/1.1", "Host"]):
        assert len(statuses(raw(endpoint, "\r\n".join([*lines, "", ""]).encode()))) <= 1, lines


def slow_clients_hold_up_nobody(endpoint: Endpoint, expected: str, count: int) -> None:
    """Heads and bodies that never end, with and without the key, more than the server has threads."""
    bare = Endpoint(endpoint.url, endpoint.model)
    parts: Sequence[bytes] = (
        head(endpoint, "POST", CHAT, "Content-Type: application/json", "Content-Length: 1000") + b"\r\n{",
        head(bare, "POST", CHAT, "Content-Type: application/json", "Content-Length: 1000") + b"\r\n{",
        head(bare, "POST", CHAT, "Transfer-Encoding: chunked") + b"\r\n5\r\n{",
        head(bare, "GET", "/health"),
        b"P",
        b"",
    )
    with contextlib.ExitStack() as slow:
        for number in range(count):
            one = slow.enter_context(connect(endpoint))
            with contextlib.suppress(ConnectionError):
                one.sendall(parts[number % len(parts)])
        for _ in range(3):
            answers_as(endpoint, expected)
