"""A streamed answer, from the bytes of its server-sent events, for `client`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from forge.errors import StageError
from forge.serve import wire
from forge.serve.endpoint import Endpoint
from forge.serve.wire import Reply


class Streamed:
    """Feed it what arrives; `reply` is the whole once the last event was there."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._rest = b""
        self._pieces: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish_reason = ""
        self._usage: dict[str, Any] = {}
        self._ended = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The pieces of text that `chunk` completes. Raises the error that an event reports."""
        # Split at line feeds only: httpx's `iter_lines` also splits at U+2028 and its like, which a
        # JSON text may hold as they are.
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if self._ended or not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                self._ended = True
                return
            try:
                pieces = list(self._pieces_of(self._event(data)))
            except (AttributeError, TypeError, ValueError) as wrong:
                raise StageError(
                    f"{self.endpoint.url} sent an event that is no part of an answer: {data[:80]!r}"
                ) from wrong
            yield from pieces

    def _event(self, data: bytes) -> dict[str, Any]:
        try:
            event: dict[str, Any] = json.loads(data)
        except ValueError as wrong:
            raise StageError(f"{self.endpoint.url} sent an event that is not JSON: {data[:80]!r}") from wrong
        if not isinstance(event, dict):
            raise StageError(f"{self.endpoint.url} sent an event that is no JSON object: {data[:80]!r}")
        # Once a stream has begun its status is 200, whatever happens later.
        wire.check_error(self.endpoint, event)
        return event

    def _pieces_of(self, event: dict[str, Any]) -> Iterator[str]:
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            delta = choice.get("delta") or {}
            self._reasoning.append(wire.reasoning_of(delta))
            for call in delta.get("tool_calls") or ():
                _join_call(self._calls.setdefault(int(call.get("index") or 0), {}), call)
            if piece := wire.content_text(delta.get("content")):
                self._pieces.append(piece)
                yield piece

    def reply(self) -> Reply:
        """The whole answer; raises `httpx.RemoteProtocolError` when its last event never came."""
        if not self._ended:
            raise httpx.RemoteProtocolError("the stream ended without its last event")
        read, written = (int(self._usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens"))
        text, reasoning = "".join(self._pieces), "".join(self._reasoning)
        calls = tuple(self._calls[index] for index in sorted(self._calls))
        return Reply(text, self._finish_reason, read, written, reasoning, calls)


def _join_call(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add what came of a tool call: its name once, its arguments piece by piece."""
    function = whole.setdefault("function", {"name": "", "arguments": ""})
    for key, piece in (part.get("function") or {}).items():
        function[key] = function.get(key, "") + (piece or "")
    whole |= {key: value for key, value in part.items() if key not in ("function", "index")}
