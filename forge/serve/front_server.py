"""The front's connections: who is slow makes room, and what is no HTTP is answered in OpenAI's shape.

uvicorn serves, with h11's strict reading of requests: a header without a colon, a space before it, two
lengths are refused before anything is passed on. What it has no limits for is limited here: the time to
the end of a request's head, a client that takes nothing of its answer, and the number of
connections, where the oldest that has not asked yet makes room for a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from forge.errors import StageError
from forge.serve import front_rules as rules
from forge.serve.behind import Behind
from forge.serve.front import Front
from forge.serve.front_rules import error_body
from forge.serve.runtime import ServerSettings

_KEEP_ALIVE_SECONDS = 75
_MOST_CONNECTIONS = 1000
# Descriptors for everything else that this process has open.
_OTHER_DESCRIPTORS = 100
_SECONDS_TO_STOP = 10.0
_HINTS = {errno.EADDRINUSE: "", errno.EACCES: "choose another --port"}


def most_connections() -> int:
    """As many as there are descriptors for: an answer takes two, to the client and to the server behind."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(16, min(_MOST_CONNECTIONS, (soft - _OTHER_DESCRIPTORS) // 2))


class Connection(H11Protocol):
    """A client's connection."""

    most = _MOST_CONNECTIONS
    open_ones: dict[Connection, None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._expect_head()
        self.open_ones[self] = None
        if len(self.open_ones) > self.most:
            # The oldest that has not asked yet; where all wait for answers, the new one.
            waiting = (connection for connection in self.open_ones if not connection._has_asked())
            next(waiting, self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open_ones.pop(self, None)
        self._cancel(self._deadline, self._stalled)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._cancel(self._deadline)
            self._deadline = None
        elif self._deadline is None and self.conn.their_state is h11.IDLE:
            self._expect_head()

    def on_response_complete(self) -> None:
        self._cancel(self._deadline)
        self._deadline = None
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(rules.STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel(self._stalled)
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        # Not `close`, which would wait for a client that has taken nothing of its answer.
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read as a request, or as its body."""
        wrong = sys.exception()
        status = wrong.error_status_hint if isinstance(wrong, h11.RemoteProtocolError) else 400
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(error_body(status, f"this is no request: {wrong or msg}", "invalid_request_error"))
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        events = (
            h11.Response(status_code=status, headers=headers),
            h11.Data(body.encode()),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _has_asked(self) -> bool:
        """Whether its request is whole, so that it waits for its answer."""
        return self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(rules.HEAD_SECONDS, self.transport.abort)

    @staticmethod
    def _cancel(*timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()


@contextlib.contextmanager
def bound(settings: ServerSettings) -> Iterator[socket.socket]:
    """The front's socket, taken before anything is loaded; raises `StageError` when the port is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except OSError as wrong:
        raise StageError(
            f"{settings.host}:{settings.port} cannot be listened on: {_reason(wrong)}",
            hint=_HINTS.get(wrong.errno or 0, "choose another --host"),
        ) from wrong
    with listener:
        yield listener


def _reason(wrong: OSError) -> str:
    """Without the address, which `create_server` repeats: it raises an error of its own for the real one."""
    if isinstance(wrong, socket.gaierror) or isinstance(wrong.__context__, socket.gaierror):
        return "there is no such host"  # its numbers are those of no other error, and differ by system
    return str(wrong) if wrong.errno is None else os.strerror(wrong.errno)


@contextlib.contextmanager
def opened(listener: socket.socket, settings: ServerSettings, behind: Behind) -> Iterator[int]:
    """Serve on `listener` what `behind` answers until the block ends; yields the port."""
    kind: Any = type("_Connection", (Connection,), {"most": most_connections(), "open_ones": {}})
    servers: list[uvicorn.Server] = []
    ready = threading.Event()
    port: int = listener.getsockname()[1]

    async def serve() -> None:
        config = uvicorn.Config(
            Front(settings, behind), http=kind, ws="none", loop="asyncio", lifespan="off",
            log_config=None, log_level="critical", access_log=False, proxy_headers=False,
            server_header=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=0,
            h11_max_incomplete_event_size=rules.MOST_HEAD_BYTES,
        )  # fmt: skip
        servers.append(uvicorn.Server(config))
        ready.set()
        await servers[0].serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True, name="forge-front")
    thread.start()
    ready.wait()
    try:
        yield port
    finally:
        servers[0].should_exit = servers[0].force_exit = True
        thread.join(_SECONDS_TO_STOP)
