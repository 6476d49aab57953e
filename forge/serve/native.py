"""Ollama's own routes, for what its OpenAI-compatible ones drop without a word.

Measured on 0.33: `/v1/completions` puts the chat template around every prompt, `/v1` ignores `top_k` and
`min_p`, and a conversation that is longer than the context loses its oldest turns on every route. So texts
go to `/api/chat` and raw prompts to `/api/generate`, and a conversation of several turns is rendered
first: whatever of it is not in the prompt is an error. https://docs.ollama.com/api.

Not covered: images and tools, which stay on `/v1`, and are refused where that would drop what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forge.serve import wire
from forge.serve.endpoint import Endpoint
from forge.serve.wire import GarbledError, RefusedError, Reply, Sampling

CHAT = "/api/chat"
GENERATE = "/api/generate"
VERSION = "/api/version"
ROOT = "/"
_GREETING = "Ollama is running"
_PLAIN_KEYS = {"role", "content", "name"}
_IGNORED = ("top_k", "min_p")


def names_version(payload: object) -> bool:
    """Whether the answer of `VERSION` is such as Ollama's; others imitate it; see `greets`."""
    return isinstance(payload, dict) and isinstance(payload.get("version"), str)


def greets(content: bytes) -> bool:
    """Whether the answer of `ROOT` is Ollama's own."""
    return content.strip() == _GREETING.encode()


def plain_texts(messages: object) -> list[dict[str, str]] | None:
    """The messages as `/api/chat` takes them; None where one is more than a text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return None
    taken = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            return None
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        is_text = all(isinstance(part, dict) and part.get("type", "text") == "text" for part in parts)
        if set(message) - _PLAIN_KEYS or not is_text or not isinstance(content, str | list):
            return None
        role = {"developer": "system"}.get(str(message["role"]), str(message["role"]))
        taken.append({"role": role, "content": wire.content_text(content)})
    return taken


def chat_request(
    endpoint: Endpoint, messages: Sequence[Mapping[str, str]], sampling: Sampling
) -> dict[str, object]:
    """The body of an answer to `texts`; the server is asked to cut nothing, which not every version hears."""
    body = {"messages": [dict(message) for message in messages], "truncate": False}
    return body | _sampled(endpoint, sampling)


def completion_request(endpoint: Endpoint, prompt: str, sampling: Sampling) -> dict[str, object]:
    """The body of a completion: `prompt` goes to the model as it is."""
    return {"prompt": prompt, "raw": True, "truncate": False} | _sampled(endpoint, sampling)


def _sampled(endpoint: Endpoint, sampling: Sampling) -> dict[str, object]:
    options: dict[str, object] = {
        "num_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }
    optional = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    options |= {name: value for name, value in optional.items() if value is not None}
    if sampling.stop:
        options["stop"] = list(sampling.stop)
    body: dict[str, object] = {"model": endpoint.model, "stream": False, "options": options}
    return body | ({"format": dict(sampling.schema)} if sampling.schema is not None else {})


def render_request(endpoint: Endpoint, messages: Sequence[Mapping[str, str]]) -> dict[str, object] | None:
    """The body that asks for the prompt of a conversation; None where there is no turn to lose."""
    if sum(message["role"] == "user" for message in messages) < 2:
        return None
    body = {"messages": [dict(message) for message in messages], "truncate": False}
    return body | {"model": endpoint.model, "stream": False, "_debug_render_only": True}


def require_whole(messages: Sequence[Mapping[str, str]], payload: Mapping[str, Any]) -> None:
    """Raise `RefusedError` where what the user said is not all in the prompt, in its order.

    Only the user's messages: a template may leave out what an assistant thought. A server before 0.11.5
    does not show its prompts, and is not asked.
    """
    shown = (payload.get("_debug_info") or {}).get("rendered_template")
    if not isinstance(shown, str):
        return
    position = 0
    for number, message in enumerate(messages, 1):
        if message["role"] != "user":
            continue
        text = message["content"].strip()
        place = shown.find(text, position)
        if place < 0:
            raise RefusedError(
                f"the conversation does not fit into the model's context: Ollama leaves out message {number}",
                status=400,
                hint="shorten it, or give the model a larger num_ctx: forge import with a larger context",
            )
        position = place + len(text)


def refuse_ignored(path: str, asked: Mapping[str, object]) -> None:
    """Raise `RefusedError` for what the OpenAI-compatible routes would drop; `asked` is a body of theirs."""
    if path == wire.COMPLETION:
        raise RefusedError(
            f"Ollama's {path} puts the chat template around every prompt",
            status=422,
            hint="write the rows with id and prompt, and give --raw",
        )
    if dropped := [name for name in _IGNORED if asked.get(name) is not None]:
        raise RefusedError(
            f"Ollama's OpenAI-compatible routes ignore {' and '.join(dropped)}",
            status=422,
            hint="leave them out of rows with tools or images, or serve the model with forge serve",
        )


def read_reply(endpoint: Endpoint, payload: Mapping[str, Any]) -> Reply:
    """The reply in the answer of `CHAT` or `GENERATE`."""
    try:
        message = {"content": payload["response"]} if "response" in payload else payload["message"]
        return Reply(
            text=wire.content_text(message.get("content")),
            finish_reason=str(payload.get("done_reason") or ""),
            prompt_tokens=int(payload.get("prompt_eval_count") or 0),
            completion_tokens=int(payload.get("eval_count") or 0),
            reasoning=wire.content_text(message.get("thinking")),
            tool_calls=tuple(dict(call) for call in message.get("tool_calls") or ()),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as wrong:
        raise GarbledError(f"{endpoint.url} answered with something that is no answer of Ollama's") from wrong
