"""A client of OpenAI-compatible servers that waits for each answer; `async_client` has the other kind.

`chat`, `stream_chat`, `model_names` and `health` work with any of them; `properties`, `tokenize`
and `apply_template` are llama-server's own routes. Not covered: tools, images, embeddings.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import httpx

from forge.serve import native, wire
from forge.serve.endpoint import Endpoint, Message
from forge.serve.streamed import Streamed
from forge.serve.wire import Reply, Sampling


class Client:
    """A connection to `endpoint`. Use it as a context manager.

    Every method raises `UnreachableError`, `BusyError`, `RefusedError`, `GarbledError` or `GoneError`: see
    `wire`.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._http = httpx.Client(**wire.connection_options(endpoint))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def chat(self, messages: Sequence[Message], sampling: Sampling | None = None) -> Reply:
        """The whole answer to a conversation."""
        self._require_whole(messages)
        body = wire.chat_request(self.endpoint, messages, sampling or Sampling())
        return wire.read_reply(self.endpoint, self._ask("POST", wire.CHAT, body))

    def stream_chat(
        self, messages: Sequence[Message], sampling: Sampling | None = None
    ) -> Generator[str, None, Reply]:
        """Yield the answer piece by piece; the generator's value is the whole `Reply`.

        Closing the generator closes the connection, at which llama-server stops generating.
        """
        self._require_whole(messages)
        body = wire.chat_request(self.endpoint, messages, sampling or Sampling(), stream=True)
        streamed = Streamed(self.endpoint)
        with wire.failures_of(self.endpoint):
            asked = self._http.stream(
                "POST", self.endpoint.route(wire.CHAT), json=body, headers=wire.STREAM_HEADERS
            )
            with asked as response:
                if not response.is_success:
                    response.read()
                    wire.read_object(self.endpoint, response)
                for chunk in response.iter_bytes():
                    yield from streamed.feed(chunk)
            return streamed.reply()

    def complete(self, prompt: str, sampling: Sampling | None = None) -> Reply:
        """What follows `prompt`, which no chat template is put around."""
        body = wire.completion_request(self.endpoint, prompt, sampling or Sampling())
        return wire.read_reply(self.endpoint, self._ask("POST", wire.COMPLETION, body))

    def is_ollama(self) -> bool:
        """Whether it is Ollama; others imitate its API, and only itself greets so."""
        with wire.failures_of(self.endpoint):
            version = self._http.get(self.endpoint.route(native.VERSION))
            if not version.is_success or not native.names_version(wire.parse_answer(version.content)):
                return False
            return native.greets(self._http.get(self.endpoint.route(native.ROOT)).content)

    def _require_whole(self, messages: Sequence[Message]) -> None:
        """Raise `RefusedError` where Ollama would leave out the oldest turns of a conversation."""
        if self.endpoint.is_ollama and (body := native.render_request(self.endpoint, messages)):
            rendered = self._ask("POST", native.CHAT, body)
            with wire.as_expected(self.endpoint, "prompt"):
                native.require_whole(messages, rendered)

    def health(self) -> bool:
        """Whether it is ready: False while it loads its model."""
        try:
            self._ask("GET", "/health")
        except wire.BusyError:
            return False
        return True

    def model_names(self) -> list[str]:
        """The models that it serves."""
        return wire.read_models(self.endpoint, self._ask("GET", wire.MODELS))

    def weight_bytes(self) -> int | None:
        """What the tensors of llama-server's model take; None where it does not say."""
        models = self._ask("GET", wire.MODELS)
        with wire.as_expected(self.endpoint, "size of the model"):
            sizes = [model["meta"]["size"] for model in models["data"] if model.get("meta")]
            return int(sizes[0]) if sizes else None

    def properties(self) -> Mapping[str, Any]:
        """llama-server's settings, such as `total_slots` and `default_generation_settings.n_ctx`."""
        return self._ask("GET", "/props")

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """The server's token ids of `text`; special tokens in it are recognised."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        answer = self._ask("POST", "/tokenize", body)
        with wire.as_expected(self.endpoint, "list of tokens"):
            return [int(token) for token in answer["tokens"]]

    def next_tokens(self, ids: Sequence[int], count: int) -> list[tuple[int, float]]:
        """The most likely next ids after `ids` with their natural log-probabilities, before sampling.

        Empty where the first of them is no whole character: llama-server then says nothing.
        """
        body = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": count,
            "temperature": 0.0,
            "cache_prompt": False,
        }
        first, *_ = self._ask("POST", "/completion", body).get("completion_probabilities") or [{}]
        with wire.as_expected(self.endpoint, "list of probabilities"):
            return [(int(token["id"]), float(token["logprob"])) for token in first.get("top_logprobs", ())]

    def adapter_scales(self) -> list[float]:
        """The scales of llama-server's adapters, for requests that name none."""
        with wire.failures_of(self.endpoint):
            response = self._http.get(self.endpoint.route("/lora-adapters"))
        if not response.is_success:
            wire.read_object(self.endpoint, response)
        with wire.as_expected(self.endpoint, "list of adapters"):
            return [float(adapter["scale"]) for adapter in response.json()]

    def apply_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The prompt that the server would give to the model."""
        body: dict[str, object] = {"messages": [dict(message) for message in messages]}
        body |= {"tools": [dict(tool) for tool in tools]} if tools else {}
        answer = self._ask("POST", "/apply-template", body)
        with wire.as_expected(self.endpoint, "prompt"):
            return str(answer["prompt"])

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Mapping[str, Any]:
        with wire.failures_of(self.endpoint):
            response = self._http.request(method, self.endpoint.route(path), json=body)
        return wire.read_object(self.endpoint, response)


def find(url: str, *, model: str | None = None, api_key: str | None = None) -> Endpoint:
    """The endpoint at `url`, with `model`, else the first that it lists.

    Raises what `Client` raises, and `RecipeError` for a model that it does not list.
    """
    with Client(Endpoint(url, "", api_key)) as client:
        names = client.model_names()
        is_ollama = client.is_ollama()
    return Endpoint(url, wire.choose_model(url, names, model), api_key, is_ollama=is_ollama)
