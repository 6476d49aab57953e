"""What OpenAI's clients ask that llama-server answers otherwise, or in silence not at all.

* A tool that must be called (`tool_choice`: `required`, or a function by name) where the model's template
  knows no tools: the tools are listed in the system message, a JSON schema holds the answer to one call, and
  the answer is written as OpenAI writes calls.
* `/v1/completions` with `logprobs` as a number, in the shape of completions, and with `echo`: the prompt's
  own log-probabilities are asked position by position, which takes the time of one token each.

Pure but for `ask`, which the front gives: it sends a body to the server behind and gives the answer's JSON.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from forge.serve.front_asks import is_forced
from forge.serve.front_rules import RefusedRequestError

Ask = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]

CHAT = frozenset({"/v1/chat/completions", "/chat/completions"})
RESPONSE = frozenset({"/v1/responses", "/responses"})
COMPLETION = frozenset({"/v1/completions"})
_MOST_ECHOED = 2048
# Most tokens of a text are among these; for the others the whole vocabulary is asked.
_FEW, _ALL = 100, 1 << 20
_TOLD = (
    "You answer with one call of one of these functions, as JSON with its name and its arguments, "
    "and with nothing else:\n"
)


def forces_tool(path: str, fields: object) -> bool:
    """Whether a request wants a call of a tool and nothing else."""
    return path in CHAT and isinstance(fields, dict) and bool(fields.get("tools")) and is_forced(fields)


def with_response_format(path: str, fields: Any) -> Any:
    """A request for a response with its form of the answer where llama-server reads it: as a chat has it."""
    text = fields.get("text") if path in RESPONSE and isinstance(fields, dict) else None
    form = text.get("format") if isinstance(text, dict) else None
    if not isinstance(form, dict):
        return fields
    held = {name: form[name] for name in ("name", "strict", "schema") if name in form}
    as_chat = {"type": form.get("type"), **({"json_schema": held} if held else {})}
    return {**fields, "response_format": as_chat}


def with_forced_tool(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The request without tools, whose answer is the JSON of a call.

    Raises `RefusedRequestError` for tools that are none, and for a choice that is none of them.
    """
    try:
        tools = [tool["function"] for tool in fields["tools"]]
        names = [str(tool["name"]) for tool in tools]
        choice = fields["tool_choice"]
        wanted = names if choice == "required" else [choice["function"]["name"]]
        messages = [dict(message) for message in fields["messages"]]
    except (KeyError, TypeError, ValueError) as wrong:
        raise RefusedRequestError(
            400, f"tools, tool_choice and messages as OpenAI has them: {wrong}"
        ) from None
    if missing := [name for name in wanted if name not in names]:
        raise RefusedRequestError(400, f"tool_choice: there is no tool {missing[0]!r}")
    chosen = [tool for tool in tools if tool["name"] in wanted]
    instruction = _TOLD + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in chosen)
    if messages and messages[0].get("role") == "system" and isinstance(messages[0].get("content"), str):
        messages[0]["content"] += "\n\n" + instruction
    else:
        messages.insert(0, {"role": "system", "content": instruction})
    left_out = ("tools", "tool_choice", "parallel_tool_calls", "stream", "stream_options")
    asked = {name: value for name, value in fields.items() if name not in left_out}
    schema = {"anyOf": [_call_schema(tool) for tool in chosen]}
    form = {"type": "json_schema", "json_schema": {"name": "call", "strict": True, "schema": schema}}
    return {**asked, "messages": messages, "response_format": form}


def _call_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    arguments = tool.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": tool["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def as_tool_calls(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer with its JSON as calls; one that was cut stays as it is, with its `finish_reason`."""
    for choice in answer.get("choices", ()):
        try:
            call = json.loads(choice["message"]["content"])
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        except (ValueError, KeyError, TypeError):
            continue
        calls = [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}]
        choice["message"] = {"role": "assistant", "content": None, "tool_calls": calls}
        choice["finish_reason"] = "tool_calls"
    return answer


def as_stream(answer: Mapping[str, Any], *, usage: bool) -> Iterator[bytes]:
    """A whole chat completion as the events of a stream, for who asked for one."""
    shared = {key: answer[key] for key in ("id", "created", "model") if key in answer}
    shared["object"] = "chat.completion.chunk"

    def event(choices: Sequence[object], **more: object) -> bytes:
        return f"data: {json.dumps({**shared, 'choices': choices, **more})}\n\n".encode()

    for choice in answer.get("choices", ()):
        delta = dict(choice["message"])
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        index = choice.get("index", 0)
        yield event([{"index": index, "delta": delta, "finish_reason": None}])
        yield event([{"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}])
    if usage:
        yield event([], usage=answer.get("usage"))
    yield b"data: [DONE]\n\n"


def wants_completion_shape(path: str, fields: object) -> bool:
    """Whether a completion asks for what llama-server shapes as a chat, or leaves out."""
    if path not in COMPLETION or not isinstance(fields, dict):
        return False
    return bool(fields.get("echo")) or (_counted(fields) is not None and not fields.get("stream"))


def _counted(fields: Mapping[str, Any]) -> int | None:
    """How many log-probabilities of a position a completion asks for; None where it asks as a chat does."""
    count = fields.get("logprobs")
    return count if isinstance(count, int) and not isinstance(count, bool) else None


async def completion(fields: Mapping[str, Any], ask: Ask) -> dict[str, Any]:
    """The answer to such a completion; raises `RefusedRequestError` for what cannot be done."""
    if fields.get("stream"):
        raise RefusedRequestError(400, "echo does not stream")
    if not 0 <= (_counted(fields) or 0) <= _FEW:
        raise RefusedRequestError(400, f"logprobs: from 0 to {_FEW}")
    if not fields.get("echo"):
        answer = await ask("/v1/completions", fields)
        for choice in answer.get("choices", ()):
            choice["logprobs"] = _legacy(_entries(choice), 0)
        return answer
    if fields.get("n", 1) != 1:
        raise RefusedRequestError(400, "echo gives one choice for each prompt: leave n out")
    answers = [await _echoed(fields, prompt, ask) for prompt in _prompts(fields.get("prompt"))]
    whole = answers[0]
    whole["choices"] = [
        {**choice, "index": number}
        for number, choice in enumerate(choice for answer in answers for choice in answer["choices"])
    ]
    return whole


def _prompts(prompt: object) -> list[str | list[int]]:
    """Every prompt of a request: a text, ids, or a list of either."""
    if isinstance(prompt, str) and prompt:
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, int) for item in prompt):
            return [prompt]
        if all(isinstance(item, (str, list)) and item for item in prompt):
            return list(prompt)
    raise RefusedRequestError(400, "echo needs a prompt: a text, token ids, or a list of either")


async def _echoed(fields: Mapping[str, Any], prompt: str | list[int], ask: Ask) -> dict[str, Any]:
    answer = await ask("/v1/completions", {**fields, "echo": False, "prompt": prompt, "n": 1})
    choice = answer["choices"][0]
    kept = _entries(choice)
    if fields.get("max_tokens") == 0:
        # llama-server says one token at least.
        choice |= {"text": "", "finish_reason": "length"}
        kept = []
    if isinstance(prompt, str):
        text, body = prompt, {"content": prompt, "add_special": True, "parse_special": True}
        ids = [int(token) for token in (await ask("/tokenize", body))["tokens"]]
    else:
        ids = prompt
        text = str((await ask("/detokenize", {"tokens": ids}))["content"])
    choice["text"] = text + choice["text"]
    if (count := _counted(fields)) is None:
        return answer
    if len(ids) > _MOST_ECHOED:
        raise RefusedRequestError(400, f"log-probabilities of a prompt of at most {_MOST_ECHOED} tokens")
    first = str((await ask("/detokenize", {"tokens": ids[:1]}))["content"])
    own: list[dict[str, Any]] = [{"token": first, "logprob": None, "top_logprobs": []}]
    adapters = {"lora": fields["lora"]} if "lora" in fields else {}
    own += [await _position(ids[:end], ids[end], count, adapters, ask) for end in range(1, len(ids))]
    choice["logprobs"] = _legacy([*own, *kept], 0)
    return answer


async def _position(
    before: list[int], token: int, count: int, adapters: Mapping[str, Any], ask: Ask
) -> dict[str, Any]:
    """What the model, with the adapters of the request, gave `token` after `before`."""
    for most in (_FEW, _ALL):
        body = {"prompt": before, "n_predict": 1, "n_probs": most, "temperature": 0, "cache_prompt": True}
        positions = (await ask("/completion", {**body, **adapters})).get("completion_probabilities") or [{}]
        top = positions[0].get("top_logprobs", [])
        for entry in top:
            if entry["id"] == token:
                return {**entry, "top_logprobs": top[:count]}
    raise RefusedRequestError(400, f"the server says nothing of token {token} at position {len(before)}")


def _entries(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    logprobs = choice.get("logprobs")
    return list(logprobs.get("content") or ()) if isinstance(logprobs, dict) else []


def _legacy(entries: Sequence[Mapping[str, Any]], begin: int) -> dict[str, Any]:
    """Log-probabilities in the shape of `/v1/completions`."""
    offsets: list[int] = []
    for entry in entries:
        offsets.append(begin)
        begin += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {token["token"]: token["logprob"] for token in entry["top_logprobs"]} or None for entry in entries
        ],
        "text_offset": offsets,
    }
