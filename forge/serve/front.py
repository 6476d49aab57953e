"""The front door: the one thing that clients reach of a server that forge starts.

llama-server listens behind it on a socket that only forge reaches; only the front knows the key,
the names that it goes by, the web pages that may ask and the adapters by name (`front_rules`). A
request's body is read whole, and written anew for the server behind; answers stream through as they
come, and who goes away stops the work that was done for him.

Not covered: WebSockets, TLS, HTTP/2.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from forge.serve import front_openai as openai
from forge.serve import front_rules as rules
from forge.serve.behind import SECONDS_TO_ANSWER, Behind, BehindError, ServerAnswer
from forge.serve.front_asks import is_forced
from forge.serve.front_rules import RefusedRequestError, Rules, error_body
from forge.serve.runtime import ServerSettings

# Where llama-server itself holds an answer to a call, or nobody does.
_CALLS_BY_TEMPLATE = openai.RESPONSE | {"/v1/messages"}
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

_SECONDS_OF_HEALTH = 5.0
# What the server behind hears of a request's head; the rest is between client and front.
_PASSED = frozenset({b"accept", b"accept-encoding", b"content-type", b"if-none-match", b"anthropic-version"})
# Not where the front itself reads the answer.
_READ_HERE = frozenset({b"accept-encoding", b"if-none-match"})
# Given twice, another might read the other one.
_SINGLE = ("origin", "authorization", "x-api-key", "content-type", "content-encoding")
# Of one connection only (RFC 9110, 7.6.1), or the front's own affair.
_KEPT_BACK = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade", b"trailer", b"server"}
)
# Who is refused has his body read first, up to here: closing on him would lose the answer.
_DRAINED_BYTES = 1 << 20
_DRAINED_SECONDS = 1.0
# Bodies over the first figure share the second until they are answered: as Python's values, JSON of
# nothing but brackets takes twenty times its bytes.
_SMALL_BYTES = 1 << 20
_MOST_BYTES_AT_ONCE = 64 << 20
# Connections of the server behind that are kept for its health.
_SPARE = 16


class Front:
    """The ASGI application. Use it in one event loop."""

    def __init__(self, settings: ServerSettings, behind: Behind) -> None:
        self.rules = Rules.of(settings)
        self.behind = behind
        self.room = asyncio.Semaphore(max(1, settings.http_threads - _SPARE))
        self.held_bytes = 0
        self.knows_tools: bool | None = None

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        extra = {"x-request-id": f"req_{uuid.uuid4().hex}"}
        try:
            if not await self._answered_itself(request, extra, send):
                async with self._body(request) as body:
                    content = self._content(request, body)
                    await _until_gone(receive, self._pass(request, content, extra, send))
        except RefusedRequestError as refused:
            await _refuse(request, refused, extra, send)
        except RecursionError:
            too_deep = RefusedRequestError(400, "the request is nested too deeply")
            await _refuse(request, too_deep, extra, send)
        except (ClientDisconnect, BehindError, ConnectionError, TimeoutError):
            # Too late for another answer: the server closes the connection, in the middle of this one.
            return

    async def _answered_itself(self, request: Request, extra: dict[str, str], send: _Send) -> bool:
        """Let the request in, or raise; True where that was all that it asked for."""
        scope, method = request.scope, request.method
        if scope["http_version"] not in ("1.0", "1.1"):
            raise RefusedRequestError(505, "this server speaks HTTP/1.1")
        target = len(scope["raw_path"]) + len(scope["query_string"])
        if target + sum(len(name) + len(value) for name, value in scope["headers"]) > rules.MOST_HEAD_BYTES:
            raise RefusedRequestError(431, f"headers of at most {rules.MOST_HEAD_BYTES} bytes")
        hosts = request.headers.getlist("host")
        if len(hosts) != 1:
            raise RefusedRequestError(400, "a request has one Host header")
        if twice := [name for name in _SINGLE if len(request.headers.getlist(name)) > 1]:
            raise RefusedRequestError(400, f"send the header {twice[0]} only once")
        self.rules.check_host(hosts[0], (scope.get("server") or ("",))[0])
        origin = request.headers.get("origin")
        if self.rules.check_origin(origin, hosts[0]) and origin is not None:
            extra |= {"access-control-allow-origin": origin, "vary": "Origin"}
        if method == "OPTIONS":
            await Response(status_code=204, headers=extra | _preflight(request))(scope, request.receive, send)
            return True
        path = _path_of(request)
        self.rules.check_route(method, path)
        if not self.rules.is_public(method, path):
            self.rules.check_key(request.headers.get("authorization"), request.headers.get("x-api-key"))
        if path in rules.MODELS or (name := self.rules.model_in(path)) is None:
            return False
        if unquote(name) not in self.rules.models:
            raise self.rules.no_model(unquote(name))
        return False

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytearray]:
        """A request's body, whole; a large one counts as held until the block ends."""
        length = request.headers.get("content-length")
        if length is not None and "transfer-encoding" in request.headers:
            raise RefusedRequestError(400, "a request has a Content-Length or a Transfer-Encoding, not both")
        if length is not None and (len(length) > 18 or int(length) > rules.MOST_BODY_BYTES):
            raise RefusedRequestError(413, f"{length[:18]} bytes; at most {rules.MOST_BODY_BYTES}")
        held = 0
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(rules.BODY_SECONDS):
                    async for piece in request.stream():
                        body += piece
                        if len(body) > rules.MOST_BODY_BYTES:
                            raise RefusedRequestError(413, f"at most {rules.MOST_BODY_BYTES} bytes")
                        if len(body) > _SMALL_BYTES:
                            self.held_bytes += len(body) - held
                            held = len(body)
                            if self.held_bytes > _MOST_BYTES_AT_ONCE:
                                raise RefusedRequestError(
                                    503, "too many large requests at once", "server_error"
                                )
            except TimeoutError:
                message = f"the request took longer than {rules.BODY_SECONDS:.0f} seconds to arrive"
                raise RefusedRequestError(408, message) from None
            yield body
        finally:
            self.held_bytes -= held

    def _content(self, request: Request, body: bytearray) -> Any:
        """The body as it goes to the server behind: a JSON value; None where there is none."""
        if request.method != "POST":
            return None
        if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
            raise RefusedRequestError(415, f"send the request as it is, not as {encoding}")
        path = _path_of(request)
        fields = self.rules.fields(path, request.headers.get("content-type"), body)
        return openai.with_response_format(path, fields)

    async def _pass(self, request: Request, content: Any, extra: dict[str, str], send: _Send) -> None:
        path = _path_of(request)
        if path in rules.HEALTH:
            return await self._exchange(request, content, extra, send, _SECONDS_OF_HEALTH)
        async with self.room:
            if openai.wants_completion_shape(path, content):
                answer = await openai.completion(content, self._ask)
                return await JSONResponse(answer, headers=extra)(request.scope, request.receive, send)
            if openai.forces_tool(path, content) and not await self._knows_tools():
                return await self._call_tool(request, content, extra, send)
            if path in _CALLS_BY_TEMPLATE and is_forced(content) and not await self._knows_tools():
                message = "tool_choice: the template knows no tools; /v1/chat/completions holds it to a call"
                raise RefusedRequestError(400, message)
            return await self._exchange(request, content, extra, send, SECONDS_TO_ANSWER)

    async def _call_tool(
        self, request: Request, fields: dict[str, Any], extra: dict[str, str], send: _Send
    ) -> None:
        """The answer to who wants a call of a tool of a model whose template knows none."""
        answer = openai.as_tool_calls(await self._ask(_path_of(request), openai.with_forced_tool(fields)))
        if not fields.get("stream"):
            return await JSONResponse(answer, headers=extra)(request.scope, request.receive, send)
        options = fields.get("stream_options")
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        events = b"".join(openai.as_stream(answer, usage=usage))
        whole = Response(events, media_type="text/event-stream", headers=extra)
        return await whole(request.scope, request.receive, send)

    async def _ask(self, path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """One more question to the server behind, in the place of a client's; its refusal is the client's."""
        try:
            async with self.behind.asked("POST", path, dict(fields)) as answer:
                payload = await answer.json()
        except BehindError as broken:
            raise _no_answer(broken) from None
        if not answer.is_success:
            error = payload.get("error", {})
            raise RefusedRequestError(
                answer.status, str(error.get("message")), str(error.get("type", "server_error"))
            )
        return payload

    async def _knows_tools(self) -> bool:
        """Whether the template writes tools: llama-server then holds the answer to a call by itself."""
        if self.knows_tools is None:
            try:
                async with self.behind.asked("GET", "/props") as answer:
                    properties = await answer.json()
            except BehindError as broken:
                raise _no_answer(broken) from None
            self.knows_tools = bool((properties.get("chat_template_caps") or {}).get("supports_tools"))
        return self.knows_tools

    async def _exchange(
        self, request: Request, content: Any, extra: dict[str, str], send: _Send, seconds: float
    ) -> None:
        path, wanted = _path_of(request), None
        if (wanted := self.rules.model_in(path)) is not None:
            path = "/v1/models"
        target = path.encode("ascii")
        if query := request.scope["query_string"]:
            # A `#` is no part of a request's target (RFC 9112, 3.2).
            target += b"?" + query.replace(b"#", b"%23")
        reads = path in rules.MODELS
        passed = _PASSED - _READ_HERE if reads else _PASSED
        headers = [(name, value) for name, value in request.headers.raw if name in passed]
        async with contextlib.AsyncExitStack() as stack:
            try:
                asked = self.behind.asked(
                    "GET" if reads else request.method, target, content, headers=headers, seconds=seconds
                )
                answer = await stack.enter_async_context(asked)
                listed = await answer.json() if reads and answer.is_success else None
            except BehindError as broken:
                raise _no_answer(broken) from None
            if listed is None:
                return await _stream(answer, extra, send)
        models = self._models(listed, None if wanted is None else unquote(wanted))
        return await JSONResponse(models, headers=extra)(request.scope, request.receive, send)

    def _models(self, listed: dict[str, Any], wanted: str | None) -> dict[str, Any]:
        """The list of models with the adapters in it, or the one that is wanted."""
        base = listed["data"][0]
        models = {name: {**base, "id": name, "aliases": [name]} for name in self.rules.models}
        if wanted is not None:
            return models[wanted]
        return {"object": "list", "data": list(models.values())}


def _no_answer(broken: Exception) -> RefusedRequestError:
    message = f"the server behind does not answer: {broken or type(broken).__name__}"
    return RefusedRequestError(502, message, "server_error")


def _path_of(request: Request) -> str:
    raw: bytes = request.scope["raw_path"]
    return raw.decode("ascii")


def _preflight(request: Request) -> dict[str, str]:
    """What a browser asks before it lets a page of another origin ask."""
    headers = {"access-control-allow-methods": "GET, POST, OPTIONS", "access-control-max-age": "600"}
    if wanted := request.headers.get("access-control-request-headers"):
        headers["access-control-allow-headers"] = wanted
    if request.headers.get("access-control-request-private-network"):
        headers["access-control-allow-private-network"] = "true"
    return headers if "origin" in request.headers else {"allow": "GET, POST, OPTIONS"}


async def _stream(answer: ServerAnswer, extra: dict[str, str], send: _Send) -> None:
    """The answer of the server behind, piece by piece as it comes."""
    kept = [
        (name, value)
        for name, value in answer.headers
        if (lower := name.lower()) not in _KEPT_BACK and not lower.startswith(b"access-control-")
    ]
    kept += [(name.encode(), value.encode("latin-1")) for name, value in extra.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": kept})
    async for piece in answer.pieces():
        async with asyncio.timeout(rules.STALLED_SECONDS):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: _Receive, work: Any) -> None:
    """Do the work until it is done, or the client has gone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _drain(request: Request) -> None:
    size = 0
    with contextlib.suppress(RuntimeError):  # it has been read already
        async for piece in request.stream():
            size += len(piece)
            if size > _DRAINED_BYTES:
                return


async def _refuse(request: Request, refused: RefusedRequestError, extra: dict[str, str], send: _Send) -> None:
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        await asyncio.wait_for(_drain(request), _DRAINED_SECONDS)
    headers = extra | {"connection": "close"}
    if refused.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if refused.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = "1"
    body = error_body(refused.status, refused.message, refused.kind)
    await JSONResponse(body, refused.status, headers=headers)(request.scope, request.receive, send)
