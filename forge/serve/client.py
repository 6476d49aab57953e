"""A client of OpenAI-compatible servers that waits for each answer.

`chat`, `stream_chat`, `model_names` and `health` work with any of them; `properties`, `tokenize`
and `apply_template` are llama-server's own routes. Not covered: tools, images, embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx

from forge.errors import MissingToolError, StageError
from forge.serve import wire
from forge.serve.endpoint import Endpoint, Message
from forge.serve.wire import Reply, Sampling


class Client:
    """A connection to `endpoint`. Use it as a context manager.

    Every method raises `UnreachableError`, `BusyError`, `RefusedError` or `GoneError` (see `wire`), or
    `StageError` for an answer that makes no sense.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._http = httpx.Client(**wire.connection_options(endpoint))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def chat(self, messages: Sequence[Message], sampling: Sampling | None = None) -> Reply:
        """The whole answer to a conversation."""
        body = wire.chat_request(self.endpoint, messages, sampling or Sampling())
        return wire.read_reply(self.endpoint, self._ask("POST", wire.CHAT, body))

    def stream_chat(
        self, messages: Sequence[Message], sampling: Sampling | None = None
    ) -> Generator[str, None, Reply]:
        """Yield the answer piece by piece; the generator's value is the whole `Reply`.

        Closing the generator closes the connection, at which llama-server stops generating.
        """
        body = wire.chat_request(self.endpoint, messages, sampling or Sampling(), stream=True)
        pieces: list[str] = []
        finish_reason = ""
        usage: dict[str, Any] = {}
        with wire.failures_of(self.endpoint):
            with self._http.stream("POST", self.endpoint.route(wire.CHAT), json=body) as response:
                if not response.is_success:
                    response.read()
                    wire.read_json(self.endpoint, response)
                for event in self._events(response):
                    usage = event.get("usage") or usage
                    for choice in event.get("choices") or ():
                        finish_reason = choice.get("finish_reason") or finish_reason
                        if piece := (choice.get("delta") or {}).get("content"):
                            pieces.append(piece)
                            yield piece
        counts = (int(usage.get(key, 0)) for key in ("prompt_tokens", "completion_tokens"))
        return Reply("".join(pieces), finish_reason, *counts)

    def _events(self, response: httpx.Response) -> Iterator[dict[str, Any]]:
        for line in _lines(response.iter_bytes()):
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as wrong:
                raise StageError(
                    f"{self.endpoint.url} sent an event that is not JSON: {data[:80]!r}"
                ) from wrong
            if event.get("error"):
                # Once a stream has begun its status is 200, whatever happens later.
                status = event["error"].get("code") if isinstance(event["error"], dict) else None
                status = status if isinstance(status, int) else 500
                raise wire.error_answer(self.endpoint, status, event, {})
            yield event
        raise httpx.RemoteProtocolError("the stream ended without its last event")

    def health(self) -> bool:
        """Whether it is ready: False while it loads its model."""
        try:
            self._ask("GET", "/health")
        except wire.BusyError:
            return False
        return True

    def model_names(self) -> list[str]:
        """The models that it serves."""
        listed = self._ask("GET", "/v1/models").get("data") or []
        return [str(model["id"]) for model in listed]

    def properties(self) -> Mapping[str, Any]:
        """llama-server's settings, such as `total_slots` and `default_generation_settings.n_ctx`."""
        return self._ask("GET", "/props")

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """The server's token ids of `text`; special tokens in it are recognised."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return [int(token) for token in self._ask("POST", "/tokenize", body)["tokens"]]

    def next_tokens(self, ids: Sequence[int], count: int) -> list[tuple[int, float]]:
        """The most likely next ids after `ids` with their natural log-probabilities, before sampling."""
        body = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": count,
            "temperature": 0.0,
            "cache_prompt": False,
        }
        found = self._ask("POST", "/completion", body)["completion_probabilities"][0]["top_logprobs"]
        return [(int(one["id"]), float(one["logprob"])) for one in found]

    def apply_template(self, messages: Sequence[Message]) -> str:
        """The prompt that the server would give to the model."""
        body = {"messages": [dict(message) for message in messages]}
        return str(self._ask("POST", "/apply-template", body)["prompt"])

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        with wire.failures_of(self.endpoint):
            response = self._http.request(method, self.endpoint.route(path), json=body)
        return wire.read_json(self.endpoint, response)


def find(url: str, *, api_key: str | None = None) -> Endpoint:
    """The endpoint at `url`, with the first model that it lists."""
    with Client(Endpoint(url, "", api_key)) as client:
        names = client.model_names()
    if not names:
        raise MissingToolError(f"{url} serves no model", hint="load one there first")
    return Endpoint(url, names[0], api_key)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Split at line feeds alone.

    httpx's `iter_lines` also splits at U+2028 and its like, which a JSON text may hold as they are.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest
