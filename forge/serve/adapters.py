"""Adapters by name: a small proxy in front of llama-server that is started only for `--lora`.

llama-server knows its adapters by number and switches them per request (`lora`). The proxy reads
the OpenAI `model` of a request, puts the matching `lora` in, and streams the answer through as it
comes. Keys and origins are the server's business: their headers go through.

Not covered: two adapters at once, request bodies over `MOST_BYTES`, WebSockets.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from forge.errors import StageError
from forge.serve import ready, wire
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import Runtime, Settings

MOST_BYTES = 64 << 20
_MOST_DIGITS = 18
# Of one connection alone (RFC 9110, 7.6.1), or written anew.
_NOT_PASSED = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "content-length",
    "host",
    "te",
    "upgrade",
    "trailer",
}
_WITHOUT_BODY = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
_ASKING = ("/completion", "/completions", "/chat/completions", "/infill", "/messages", "/responses")


@dataclass(frozen=True)
class Route:
    """Where the proxy sends requests, and which model name means which adapter (None: none of them)."""

    upstream: Endpoint
    numbers: Mapping[str, int | None]

    def body(self, path: str, content: bytes) -> bytes:
        """The request's body with its adapter; raises `LookupError` for a model that is not served.

        Raises `ValueError` and `RecursionError` for what is no JSON to us: the server behind might read a
        request in it, and answer without the adapter.
        """
        if not path.endswith(_ASKING) or not content:
            return content
        fields = json.loads(content)
        if not isinstance(fields, dict):
            return content  # the server says what is wrong with it
        name = fields.get("model", self.upstream.model)
        if not isinstance(name, str) or name not in self.numbers:
            raise LookupError(name)
        number = self.numbers[name]
        # All of them: an adapter that is not named keeps the scale that it was loaded with.
        others = (one for one in self.numbers.values() if one is not None)
        fields["lora"] = [{"id": one, "scale": float(one == number)} for one in others]
        return json.dumps(fields).encode()

    def models(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """`/v1/models` with the adapters in it."""
        (base, *_) = answer["data"]
        return {"object": "list", "data": [{**base, "id": name} for name in self.numbers]}


@contextlib.contextmanager
def serve_with_adapters(
    runtime: Runtime, settings: Settings, names: Mapping[str, Path], *, log: Path | None = None
) -> Iterator[Endpoint]:
    """`runtime` behind a proxy at the host and port of `settings`; `names` are the adapters.

    The model's own adapter is on for the model's own name alone: the others go on the base in its place.
    Raises what `runtime` raises, and `StageError` when the port is taken.
    """
    ready.check(replace(settings, adapters=tuple(names.values())))
    inner = replace(settings, host="127.0.0.1", port=0, adapters=tuple(names.values()))
    with runtime(inner, log=log) as upstream:
        own = None if settings.adapter is None else 0
        others = enumerate(names, start=0 if own is None else 1)
        numbers: dict[str, int | None] = {settings.alias: own, **{name: n for n, name in others}}
        with _proxy(settings, Route(upstream, numbers)) as port:
            yield replace(upstream, url=ready.url_of(settings.host, port))


@contextlib.contextmanager
def _proxy(settings: Settings, route: Route) -> Iterator[int]:
    with httpx.Client(
        timeout=wire.TIMEOUT, trust_env=False, limits=httpx.Limits(max_connections=None)
    ) as client:
        bound = type("_Bound", (_Proxy,), {"route": route, "client": client})
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        kind = type("_Listener", (_Server,), {"address_family": family})
        try:
            server: _Server = kind((settings.host, settings.port), bound)
        except OSError as wrong:
            raise StageError(
                f"{settings.host}:{settings.port} cannot be listened on: {wrong.strerror}",
                hint="choose another --port",
            ) from wrong
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked is gone: no traceback for that."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A request line that cannot be read gets an answer with a status, not as of HTTP/0.9.
    default_request_version = "HTTP/1.0"
    timeout = 600
    route: Route
    client: httpx.Client

    def log_message(self, format: str, *args: object) -> None:
        """Silent: requests carry what people wrote."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself, such as a method that nobody knows, in OpenAI's shape."""
        self._fail(code, message or HTTPStatus(code).phrase, "invalid_request_error")

    def do_GET(self) -> None:
        self._pass()

    do_POST = do_DELETE = do_OPTIONS = do_HEAD = do_GET  # noqa: N815 - http.server's names

    def _pass(self) -> None:
        if not self.path.startswith("/"):
            # Behind the server's address it would be a part of it: `@other.host/` names another machine.
            return self._fail(400, "the path must begin with /", "invalid_request_error")
        if "%u" in self.path.partition("?")[0]:
            # llama-server alone reads %u0073 as a letter, and would find a route where we see none.
            return self._fail(400, "an escape in the path is % and two digits", "invalid_request_error")
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding") or not length.isdecimal():
            return self._fail(411, "send a Content-Length", "invalid_request_error")
        if len(length) > _MOST_DIGITS or int(length) > MOST_BYTES:
            shown = f"{length[:_MOST_DIGITS]} bytes; at most {MOST_BYTES}"
            return self._fail(413, shown, "invalid_request_error")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            self.close_connection = True  # gone in the middle of it
            return None
        return self._ask(content)

    def _ask(self, content: bytes) -> None:
        try:
            url = httpx.URL(self.route.upstream.url.rstrip("/") + self.path)
            if self._has_key():
                content = self.route.body(url.path, content)  # decoded, as the server behind reads it
            elif content:
                # The server behind refuses whoever has not the key, and nothing here tells the names.
                content = b"{}"
        except httpx.InvalidURL as wrong:
            return self._fail(400, f"this cannot be passed on: {wrong}", "invalid_request_error")
        except (ValueError, RecursionError) as wrong:
            return self._fail(400, f"the request is no JSON: {wrong}", "invalid_request_error")
        except LookupError as unknown:
            known = ", ".join(self.route.numbers)
            return self._fail(404, f"no model {unknown.args[0]!r}; served are {known}", "not_found_error")
        try:
            with self.client.stream(self.command, url, content=content, headers=self._passed()) as answer:
                self._answer(answer, url.path)
        except httpx.LocalProtocolError as wrong:
            self._fail(400, f"this cannot be passed on: {wrong}", "invalid_request_error")
        except httpx.TransportError as broken:
            self._fail(502, f"the server behind does not answer: {broken}", "server_error")
        return None

    def _passed(self) -> httpx.Headers:
        """The request's headers for the server behind, byte for byte: http.server reads them as Latin-1."""
        pairs = ((k.encode("latin-1"), v.encode("latin-1")) for k, v in self.headers.items())
        headers = httpx.Headers([(k, v) for k, v in pairs if k.decode("latin-1").lower() not in _NOT_PASSED])
        headers.setdefault("Accept-Encoding", "identity")
        headers.update(wire.STREAM_HEADERS)
        return headers

    def _has_key(self) -> bool:
        """Whether the server behind would let the request in: it looks at the same, and no further."""
        key = self.route.upstream.api_key
        given = self.headers.get("Authorization") or self.headers.get("X-Api-Key") or ""
        return key is None or hmac.compare_digest(given.removeprefix("Bearer ").encode(), key.encode())

    def _answer(self, answer: httpx.Response, path: str) -> None:
        if path in ("/v1/models", "/models") and answer.is_success and self.command == "GET":
            return self._send(answer.status_code, self.route.models(json.loads(answer.read())))
        self.send_response(answer.status_code)
        for name, value in answer.headers.multi_items():
            if name.lower() not in _NOT_PASSED:
                self.send_header(name, value)
        # Of what has no body, a last chunk would be read as the beginning of the next answer.
        has_body = self.command != "HEAD" and answer.status_code not in _WITHOUT_BODY
        # HTTP/1.0 knows no chunks: there the answer ends where the connection does.
        chunked = self.request_version != "HTTP/1.0"
        if not chunked:
            self.send_header("Connection", "close")
        elif has_body:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if not has_body:
            return None
        try:
            for piece in answer.iter_raw():
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if chunked else piece)
            self.wfile.write(b"0\r\n\r\n" if chunked else b"")
        except (OSError, httpx.TransportError):
            # Whoever asked is gone, or the server is: leaving `stream` ends the other half too.
            self.close_connection = True
        return None

    def _fail(self, status: int, message: str, kind: str) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._send(status, {"error": {"code": status, "message": message, "type": kind}})

    def _send(self, status: int, payload: Mapping[str, object]) -> None:
        content = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
