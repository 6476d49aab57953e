"""What travels between forge and an OpenAI-compatible server: requests, replies and failures.

Pure functions over httpx's values, so that the client that waits (`client`) and the one that asks
many at once (`generate`) say the same things. httpx's exceptions and the server's error answers
become forge's errors here and nowhere else:

* `UnreachableError`: nothing listens, or the connection broke: worth another try later.
* `BusyError`: 408, 429, 5xx, or no answer in time: worth another try, after `retry_after` if it is given.
* `RefusedError`: any other answer that is no success: the same request would fail again.
* `GarbledError`: a success that holds no answer, as a proxy gives while the server behind it restarts.
* `GoneError`: a server that forge started has ended by itself.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from forge.errors import DataError, MissingToolError, RecipeError, StageError
from forge.serve.endpoint import Endpoint, Turn, unknown_end

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
MODELS = "/v1/models"
# A long answer of a large model on a small machine takes minutes; a connection does not.
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
# llama-server closes the connection after every streamed answer, and does not say so: the next
# request on it would race the close and lose.
STREAM_HEADERS = {"Connection": "close"}

# From a broken connection to the end of the process that held it; how often to look.
_SECONDS_TO_DIE = 2.0
_SECONDS_BETWEEN = 0.25

# Answers that are about one request. The rest (401, 403, 404, ...) would meet every other one too.
_ABOUT_THE_REQUEST = frozenset({400, 413, 422})
_OVERFLOW = "exceed_context_size_error"
_START_IT = "is it serving? start it with: forge serve MODEL"


class UnreachableError(MissingToolError):
    """Nothing answers."""


class BusyError(StageError):
    """The server cannot answer now."""

    def __init__(self, message: str, *, status: int = 503, retry_after: float | None = None) -> None:
        super().__init__(message, hint="try again later, or ask for less at once")
        self.status = status
        self.retry_after = retry_after


class RefusedError(DataError):
    """The server will not answer this."""

    def __init__(self, message: str, *, status: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status

    @property
    def about_the_request(self) -> bool:
        """Whether another request could still succeed."""
        return self.status in _ABOUT_THE_REQUEST


class GarbledError(StageError):
    """What answers does not speak this API, or not now."""


class GoneError(StageError):
    """The server that forge started is no more."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The default is greedy: the same answer every time.

    None leaves a value to the server. `schema` is a JSON schema that every answer has to meet,
    `tools` are the functions that the model may call.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    schema: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Reply:
    """An answer. `finish_reason` is `stop` (it ended by itself), `length` (it was cut) or `tool_calls`.

    `reasoning` is what a thinking model thought, `tool_calls` what it asks to be called, as OpenAI writes it.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, object], ...] = ()


def chat_request(
    endpoint: Endpoint, messages: Sequence[Turn], sampling: Sampling, *, stream: bool = False
) -> dict[str, object]:
    """The body of a chat completion."""
    body = {"messages": [dict(message) for message in messages], **_sampled(endpoint, sampling)}
    if sampling.schema is not None:
        form = {"name": "answer", "strict": True, "schema": dict(sampling.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    if sampling.tools:
        body["tools"] = [dict(tool) for tool in sampling.tools]
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def completion_request(endpoint: Endpoint, prompt: str, sampling: Sampling) -> dict[str, object]:
    """The body of a completion: `prompt` goes to the model as it is, without a chat template.

    A schema works with llama-server only.
    """
    body = {"prompt": prompt, **_sampled(endpoint, sampling)}
    return body if sampling.schema is None else body | {"json_schema": dict(sampling.schema)}


def _sampled(endpoint: Endpoint, sampling: Sampling) -> dict[str, object]:
    body: dict[str, object] = {
        "model": endpoint.model,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }
    optional = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    body |= {name: value for name, value in optional.items() if value is not None}
    return body | ({"stop": list(sampling.stop)} if sampling.stop else {})


def connection_options(endpoint: Endpoint) -> dict[str, Any]:
    """The arguments of `httpx.Client` and `httpx.AsyncClient` for this endpoint."""
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    # Plain HTTP has nothing to verify (redirects are not followed), and loading the certificates
    # takes a tenth of a second for every client.
    verify = not endpoint.url.startswith("http://")
    login = None if endpoint.api_key else endpoint.login
    return {
        "headers": headers, "timeout": TIMEOUT, "trust_env": not endpoint.loopback, "verify": verify,
        "auth": login,
    }  # fmt: skip


@contextlib.contextmanager
def failures_of(endpoint: Endpoint) -> Iterator[None]:
    """The edge where httpx's exceptions become forge's."""
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as wrong:
        raise RecipeError(
            f"{endpoint.url!r} is not the URL of a server: {wrong}", hint="such as http://127.0.0.1:8080"
        ) from wrong
    except UnicodeEncodeError as wrong:
        # Bytes of a terminal or an argument that are no UTF-8.
        raise RefusedError(f"what is asked is no text in UTF-8: {wrong.reason}", status=400) from wrong
    except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as late:
        raise BusyError(f"{endpoint.url} gave no answer within {TIMEOUT.read:.0f} seconds") from late
    except httpx.DecodingError as wrong:
        raise GarbledError(
            f"{endpoint.url} answered with what is not compressed as it says: {wrong}"
        ) from wrong
    except httpx.TransportError as broken:
        if end := _end_of(endpoint):
            raise GoneError(end) from broken
        connected = not isinstance(broken, (httpx.ConnectError, httpx.ConnectTimeout))
        what = "broke off its answer" if connected else "does not answer"
        raise UnreachableError(f"{endpoint.url} {what} ({broken})", hint=_START_IT) from broken


def _end_of(endpoint: Endpoint) -> str:
    """Why the server has ended: its connections break some time before the process is gone."""
    if endpoint.why_gone is unknown_end:
        return ""
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while not (end := endpoint.why_gone()) and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN)
    return end


@contextlib.contextmanager
def as_expected(endpoint: Endpoint, what: str) -> Iterator[None]:
    """Raise `GarbledError` where an answer has another shape than what is read from it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as wrong:
        raise GarbledError(f"{endpoint.url} answered with something that is no {what}") from wrong


def read_object(endpoint: Endpoint, response: httpx.Response) -> Mapping[str, Any]:
    """The JSON object of a successful answer. The whole body must have been read.

    Raises `BusyError` or `RefusedError` for an error answer, `GarbledError` for what is not a JSON object.
    """
    payload = parse_answer(response.content)
    if response.is_success and isinstance(payload, dict):
        check_error(endpoint, payload)
        return payload
    if response.is_success:
        shown = response.text[:80]
        raise GarbledError(
            f"{endpoint.url} answered with something that is not JSON: {shown!r}",
            hint="the URL must be the root of an OpenAI-compatible server",
        )
    # The front of a server that forge started says so when the server behind it has ended.
    if response.status_code == 502 and (end := _end_of(endpoint)):
        raise GoneError(end)
    raise error_answer(endpoint, response.status_code, payload, response.headers)


def check_error(endpoint: Endpoint, payload: Mapping[str, Any]) -> None:
    """Raise the error that an answer of status 200 reports: a stream's event, or a proxy's."""
    if not (error := payload.get("error")):
        return
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    raise error_answer(endpoint, status, payload, {})


def read_models(endpoint: Endpoint, payload: Mapping[str, Any]) -> list[str]:
    """The names in the answer of `MODELS`; raises `GarbledError` where there are none to be read."""
    try:
        return [str(model["id"]) for model in payload["data"] or []]
    except (KeyError, TypeError) as wrong:
        raise GarbledError(f"{endpoint.url} answered with something that is no list of models") from wrong


def choose_model(url: str, names: Sequence[str], wanted: str | None) -> str:
    """`wanted` as the server at `url` lists it among `names`, or the first of them.

    Raises `RecipeError`, which lists them, for one that it has not, `MissingToolError` where it has none.
    """
    if not names:
        raise MissingToolError(f"{url} serves no model", hint="load one there first")
    if not wanted:
        return names[0]
    # Ollama's list shows the tag of a name that was given without one.
    for name in (wanted, f"{wanted}:latest"):
        if name in names:
            return name
    raise RecipeError(f"{url} serves no model {wanted}", hint="served are " + ", ".join(names))


def read_reply(endpoint: Endpoint, payload: Mapping[str, Any]) -> Reply:
    """The reply in a chat completion's JSON, or in a completion's."""
    try:
        choice = payload["choices"][0]
        message = {"content": choice["text"]} if "text" in choice else choice["message"]
        usage = payload.get("usage") or {}
        return Reply(
            text=content_text(message.get("content") or message.get("refusal")),
            finish_reason=choice.get("finish_reason") or "",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            reasoning=reasoning_of(message),
            tool_calls=tool_calls_in(message),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as wrong:
        if "choices" in payload:
            # It speaks the API: nothing restarts, and waiting for long would not help this request.
            shown = json.dumps(payload["choices"], ensure_ascii=False)[:80]
            raise BusyError(f"{endpoint.url} answered without a message: {shown}", status=500) from wrong
        raise GarbledError(f"{endpoint.url} answered with something that is no chat completion") from wrong


def read_answer(endpoint: Endpoint, path: str, payload: Mapping[str, Any]) -> Reply | None:
    """The reply in the answer of the route `path`; None for embeddings, which must be there."""
    if path != EMBEDDINGS:
        return read_reply(endpoint, payload)
    if not isinstance(payload.get("data"), list):
        raise GarbledError(f"{endpoint.url} answered with something that holds no embeddings")
    return None


def reasoning_of(message: Mapping[str, Any]) -> str:
    """What a message says was thought: beside the content, under one of several names, or among its parts."""
    beside = (message.get(name) for name in ("reasoning_content", "reasoning", "reasoning_details"))
    content = message.get("content")
    parts = [part for part in content if _is_thought(part)] if isinstance(content, list) else []
    return next(filter(None, map(_thought, beside)), "") or _thought(parts)


def _is_thought(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")


def _thought(value: object) -> str:
    """The text in what a server calls thinking, however deep it lies; empty where there is none."""
    if isinstance(value, list):
        return "".join(map(_thought, value))
    if isinstance(value, dict):
        return next(filter(None, (_thought(value.get(key)) for key in ("text", "thinking", "content"))), "")
    return value if isinstance(value, str) else ""


def tool_calls_in(message: Mapping[str, Any]) -> tuple[Mapping[str, object], ...]:
    """The calls of a message; `function_call` is the only one, as OpenAI wrote it before `tool_calls`."""
    calls = message.get("tool_calls") or ()
    single = message.get("function_call")
    if not calls and isinstance(single, dict):
        calls = ({"type": "function", "function": single},)
    return tuple(dict(call) for call in calls)


def content_text(content: object) -> str:
    """The text of a content, which may be a list of parts. Raises TypeError where it is neither."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if not _is_thought(part))
    if not isinstance(content, str | None):
        raise TypeError("the content of a message is neither a text nor a list of parts")
    return content or ""


def error_answer(
    endpoint: Endpoint, status: int, payload: object, headers: Mapping[str, str]
) -> BusyError | RefusedError:
    """The error for an answer that is no success; `payload` is its JSON, if it has any."""
    detail = payload.get("error") if isinstance(payload, dict) else None
    fields = detail if isinstance(detail, dict) else {}
    reason = reason_in(payload) or "no reason given"
    if status in (408, 429) or (status >= 500 and status != 501):
        after = headers.get("retry-after", "")
        seconds = float(after) if after.isdecimal() else None
        return BusyError(f"{endpoint.url} answered {status}: {reason}", status=status, retry_after=seconds)
    if fields.get("type") == _OVERFLOW:
        size, limit = fields.get("n_prompt_tokens"), fields.get("n_ctx")
        return RefusedError(
            f"the prompt is {size} tokens long and the server's context holds {limit}",
            status=status,
            hint="shorten it, or serve with a larger --context",
        )
    hints = {
        401: "give the server's key with --api-key-file",
        403: "give the server's key with --api-key-file",
        404: "the URL must be the root of an OpenAI-compatible server, and the model one that it lists",
        501: "the server was started without this feature",
    }
    hints[405] = hints[404]
    if 300 <= status < 400 and (place := headers.get("location")):
        hints[status] = f"it redirects to {place}: if that is the server, give its URL"
    return RefusedError(
        f"{endpoint.url} answered {status}: {reason}", status=status, hint=hints.get(status, "")
    )


_REASONS = ("error", "message", "detail", "msg", "title", "reason", "errors")
_LONGEST_REASON = 500


_DEEPEST_REASON = 8


def reason_in(payload: object, depth: int = 0) -> str:
    """The reason that an error answer gives: OpenAI's `error.message`, FastAPI's `detail`, or plain text."""
    if isinstance(payload, str):
        return payload.strip()[:_LONGEST_REASON]
    if depth > _DEEPEST_REASON:
        return ""
    if isinstance(payload, list):
        return "; ".join(filter(None, (reason_in(part, depth + 1) for part in payload)))[:_LONGEST_REASON]
    if not isinstance(payload, dict):
        return ""
    reason = next(filter(None, (reason_in(payload.get(key), depth + 1) for key in _REASONS)), "")
    # FastAPI's list says of each fault where it is.
    place = payload.get("loc")
    return f"{'.'.join(map(str, place))}: {reason}" if reason and isinstance(place, list) else reason


def parse_answer(content: bytes) -> object:
    """The JSON of an answer; else its text, and None for a page of a proxy."""
    try:
        parsed: object = json.loads(content)
    except (ValueError, RecursionError):
        # A page of a proxy says nothing in one line; a sentence does.
        text = content[:4000].decode(errors="replace").strip()
        return None if text.startswith(("<", "{", "[")) else text
    return parsed
