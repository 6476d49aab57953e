"""The client for `asyncio`: many conversations at once over one connection pool.

    async with AsyncClient(endpoint) as client:
        replies = await asyncio.gather(*(client.chat(messages) for messages in conversations))

It says and raises what `client.Client` does. Not covered: retries; `generate` has them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType

import httpx

from forge.serve import wire
from forge.serve.endpoint import Endpoint, Message
from forge.serve.streamed import Streamed
from forge.serve.wire import Reply, Sampling


class AsyncClient:
    """A pool of connections to `endpoint`. Use it as an async context manager."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(**wire.connection_options(endpoint), limits=limits)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def chat(self, messages: Sequence[Message], sampling: Sampling | None = None) -> Reply:
        """The whole answer to a conversation."""
        body = wire.chat_request(self.endpoint, messages, sampling or Sampling())
        return await self._ask(wire.CHAT, body)

    async def complete(self, prompt: str, sampling: Sampling | None = None) -> Reply:
        """What follows `prompt`, which no chat template is put around."""
        body = wire.completion_request(self.endpoint, prompt, sampling or Sampling())
        return await self._ask(wire.COMPLETION, body)

    async def _ask(self, path: str, body: dict[str, object]) -> Reply:
        with wire.failures_of(self.endpoint):
            response = await self._http.post(self.endpoint.route(path), json=body)
        return wire.read_reply(self.endpoint, wire.read_json(self.endpoint, response))

    async def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        done: Callable[[Reply], None] = lambda reply: None,
    ) -> AsyncIterator[str]:
        """Yield the answer piece by piece; `done` gets the whole `Reply` at its end."""
        body = wire.chat_request(self.endpoint, messages, sampling or Sampling(), stream=True)
        streamed = Streamed(self.endpoint)
        with wire.failures_of(self.endpoint):
            asked = self._http.stream(
                "POST", self.endpoint.route(wire.CHAT), json=body, headers=wire.STREAM_HEADERS
            )
            async with asked as response:
                if not response.is_success:
                    await response.aread()
                    wire.read_json(self.endpoint, response)
                async for chunk in response.aiter_bytes():
                    for piece in streamed.feed(chunk):
                        yield piece
            done(streamed.reply())
