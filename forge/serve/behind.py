"""The server behind the front door: one request a connection, over asyncio's streams, read with h11.

llama-server closes a connection after a stream without saying so, so none is kept. A client such as httpx
would take most of the time that the front adds to an answer (docs/decisions.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

Header = tuple[bytes, bytes]

SECONDS_TO_ANSWER = 600.0
_SECONDS_TO_CONNECT = 10.0
_PIECE = 1 << 16


class BehindError(Exception):
    """The server behind does not answer, or not as a server does."""


@dataclass
class ServerAnswer:
    """What the server behind answers; its body has to be read before the connection closes."""

    status: int
    headers: Sequence[Header]
    _connection: _Connection = field(repr=False)

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes; raises `BehindError` where it ends too early."""
        while isinstance(event := await self._connection.event(), h11.Data):
            yield bytes(event.data)

    async def json(self) -> dict[str, Any]:
        """The whole body; raises `BehindError` where it is no JSON object."""
        content = b"".join([piece async for piece in self.pieces()])
        try:
            payload = json.loads(content)
        except ValueError as wrong:
            raise BehindError(str(wrong)) from None
        if not isinstance(payload, dict):
            raise BehindError(f"no JSON object: {content[:80]!r}")
        return payload


@dataclass(frozen=True)
class Behind:
    """How the server behind is reached: by a socket file, or a port of loopback with a key of its own."""

    url: str = "http://localhost"
    socket: str | None = None
    key: str = field(default="", repr=False)

    @contextlib.asynccontextmanager
    async def asked(
        self,
        method: str,
        target: str | bytes,
        body: object = None,
        *,
        headers: Sequence[Header] = (),
        seconds: float = SECONDS_TO_ANSWER,
    ) -> AsyncIterator[ServerAnswer]:
        """The answer to a request, whose `body` is a JSON value; leaving the block ends the work for it.

        Raises `BehindError`, also where nothing comes for `seconds`.
        """
        content = b"" if body is None else json.dumps(body).encode()
        whole = [(b"host", b"localhost"), (b"connection", b"close"), *headers]
        if self.key:
            whole.append((b"authorization", f"Bearer {self.key}".encode()))
        if method == "POST":
            whole.append((b"content-length", str(len(content)).encode()))
            if b"content-type" not in (name for name, _ in headers):
                whole.append((b"content-type", b"application/json"))
        connection = _Connection(*await self._connected(), seconds)
        try:
            yield await connection.answer(h11.Request(method=method, target=target, headers=whole), content)
        finally:
            connection.writer.transport.abort()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(_SECONDS_TO_CONNECT):
                if self.socket:
                    return await asyncio.open_unix_connection(self.socket)
                place = urlsplit(self.url)
                return await asyncio.open_connection(place.hostname, place.port)
        except (OSError, TimeoutError) as broken:
            raise BehindError(str(broken) or "no connection") from None


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        self.reader = reader
        self.writer = writer
        self.seconds = seconds
        self.parser = h11.Connection(h11.CLIENT)

    async def answer(self, request: h11.Request, content: bytes) -> ServerAnswer:
        parts = (request, h11.Data(content), h11.EndOfMessage()) if content else (request, h11.EndOfMessage())
        try:
            self.writer.write(b"".join(self.parser.send(part) or b"" for part in parts))
            async with asyncio.timeout(SECONDS_TO_ANSWER):
                await self.writer.drain()
        except (OSError, TimeoutError) as broken:
            raise BehindError(str(broken) or "it does not take the request") from None
        while isinstance(event := await self.event(), h11.InformationalResponse):
            pass
        if not isinstance(event, h11.Response):
            raise BehindError("no answer")
        return ServerAnswer(event.status_code, event.headers.raw_items(), self)

    async def event(self) -> object:
        """The next of h11's events."""
        try:
            while (event := self.parser.next_event()) is h11.NEED_DATA:
                async with asyncio.timeout(self.seconds):
                    piece = await self.reader.read(_PIECE)
                if not piece and self.parser.their_state is h11.SEND_RESPONSE:
                    raise BehindError("it closed the connection without an answer")
                self.parser.receive_data(piece)
        except (OSError, TimeoutError, h11.RemoteProtocolError) as broken:
            raise BehindError(str(broken) or f"nothing for {self.seconds:.0f} seconds") from None
        return event
