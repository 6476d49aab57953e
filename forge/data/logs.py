"""Rows that log what a model's API was asked and what it answered: stored, or the lines of a batch.

Each becomes a row of messages, as `exports` has them. Not covered: an answer whose request is another row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forge.data import fields
from forge.data.blocks import of_items, without
from forge.data.conversation import Turn
from forge.data.texts import TOO_DEEP, BadRowError, Notes, parsed
from forge.data.turns import turns_of

_MESSAGES = "messages"


def of_call(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a model's API was asked and what it answered: stored, logged, or the lines of a batch."""
    opened = _unfolded({**values, **{name: parsed(values[name]) for name in _HOLDERS if name in values}})
    if (answered := _answered(opened)) is not None:
        values = opened  # else a request in a text is a prompt as it stands
    asked = _asked(values)
    if asked is None and answered is None:
        return _of_generated(values)
    if answered is None and any(map(values.get, _conversations(values))):
        return None
    rest = dict(values)
    for name, whole in (("request", asked), ("response", answered)):
        if whole is not None and whole is not values:
            rest = without(rest, name, "body")
            rest |= {f"{name}.{key}": value for key, value in whole.items()}
    asked = values if asked is None else asked
    beside = "" if asked is values else "request."
    keys = [_key(asked, names) for names in (_PROMPTS, _SYSTEMS, _TOOLS)]
    used = [f"{beside}{key}" for key in (*keys, "tools") if key is not None]
    used += ["choices", "candidates"] if answered is values else [f"response.{key}" for key in _ANSWERS]
    used += ["message"] if answered is values and "done" in values else []
    used += ["output"] if answered is values and _is_response(values) else []
    tools = _value(asked, _TOOLS) or values.get("tools")
    row = {**without(rest, *used), **({"tools": tools} if tools else {})}
    if asked is not values and values.get(_MESSAGES):
        row[f"{_MESSAGES} (beside the request)"] = True
    try:
        row[_MESSAGES] = _with_answer(_prompt(asked), _answer(answered, values))
    except BadRowError as wrong:
        row[_MESSAGES] = wrong
    except RecursionError:
        row[_MESSAGES] = BadRowError(TOO_DEEP)
    return row


def _of_generated(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Ollama's answer to a bare prompt, where it is not whole."""
    if not ({"model", "prompt", "done"} <= values.keys() and isinstance(values.get("response"), str)):
        return None
    if _is_whole(reason := _ollama_reason(values)):
        return None
    return {**values, "response": _cut_off(reason, "response")}


_HOLDERS = ("request", "response", "body")
# Where APIs have the conversation in a request and in an answer; all else is listed as unused.
_PROMPTS, _SYSTEMS = (_MESSAGES, "contents", "input"), ("system", "systemInstruction", "instructions")
_TOOLS = ("tools", "functions", "toolConfig")
# What an answer of OpenAI's responses goes on from, which is not in its request.
_EARLIER = ("previous_response_id", "conversation")
_ANSWERS = ("choices", "candidates", "output", "content", "role", "message")


def _conversations(values: Mapping[str, Any]) -> list[str]:
    """The columns that hold a conversation of the row's own."""
    names = fields.ROW_FIELDS[fields.MESSAGES]
    return [key for key in values if fields.plain(key) in names and isinstance(values[key], (list, str))]


def _key(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these names under which `values` holds something, as it is spelled there."""
    spelled = {fields.plain(key): key for key in values if values[key]}
    return next((spelled[plain] for name in names if (plain := fields.plain(name)) in spelled), None)


def _value(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    key = _key(values, names)
    return None if key is None else values[key]


def _inside(value: object) -> Mapping[str, Any] | None:
    """A request or an answer, out of what a batch puts around it."""
    if isinstance(value, Mapping) and isinstance(body := parsed(value.get("body")), Mapping):
        value = body
    return _unfolded(value) if isinstance(value, Mapping) else None


def _unfolded(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A request with what google-genai has in its `config`: system prompt, tools, settings."""
    config = values.get("config")
    is_request = isinstance(config, Mapping) and "contents" in values
    return {**config, **without(values, "config")} if is_request and config else values


def _asked(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The request: in a field of its own, or beside the answer."""
    for whole in (_inside(values.get("request")), _inside(values.get("body"))):
        if whole is not None and any(isinstance(whole.get(key), (list, str)) for key in _PROMPTS):
            return whole
    is_beside = _answered(values) is not None and any(values.get(key) for key in _PROMPTS)
    return values if is_beside else None


def _answered(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    whole = _inside(values.get("response"))
    if whole is not None and (_replies(whole) or _items(whole)):
        return whole
    # Beside its prompt an answer of Anthropic's or of OpenAI's responses would be any row.
    is_call = (
        "choices" in values
        or "candidates" in values
        or {"message", "done"} <= values.keys()
        or _is_response(values)
    )
    return values if is_call and _replies(values) else None


def _is_response(values: Mapping[str, Any]) -> bool:
    return values.get("object") == "response"


def _replies(whole: Mapping[str, Any]) -> list[tuple[object, object]]:
    """The messages that an API answered with, each with why it ends."""
    if isinstance(choices := whole.get("choices"), list):
        return [
            (choice["message"], _value(choice, _REASONS)) for choice in choices if _has(choice, "message")
        ]
    if isinstance(candidates := whole.get("candidates"), list):
        return [(reply["content"], _value(reply, _REASONS)) for reply in candidates if _has(reply, "content")]
    if whole.get("role") == "assistant" and "content" in whole:
        return [(_only(whole, "role", "content"), whole.get("stop_reason"))]
    if _has(whole, "message") and "done" in whole:
        return [(whole["message"], _ollama_reason(whole))]
    if _has(whole, "message") and "finish_reason" in whole:  # Cohere's
        return [(whole["message"], whole["finish_reason"])]
    if _has(output := whole.get("output"), "message") and isinstance(output, Mapping):  # Bedrock's
        return [(output["message"], whole.get("stopReason"))]
    items = _items(whole)
    return [(items, whole.get("status"))] if items else []


def _ollama_reason(whole: Mapping[str, Any]) -> object:
    return whole.get("done_reason") if whole["done"] is True else "not done"


def _items(whole: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """What OpenAI's responses answer with: messages, and what else the model put out."""
    output = whole.get("output")
    is_answer = isinstance(output, list) and all(
        isinstance(item, Mapping) and ("type" in item or _has(item, "content")) for item in output
    )
    return tuple(output) if is_answer and isinstance(output, list) else ()


def _has(value: object, key: str) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get(key), (Mapping, list))


def _only(values: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    return {key: values[key] for key in names if key in values}


def _prompt(asked: Mapping[str, Any]) -> Sequence[Any]:
    if earlier := [key for key in _EARLIER if asked.get(key) and isinstance(asked[key], (str, Mapping))]:
        raise BadRowError("goes on from a conversation that is not in the row; leave the row out", earlier[0])
    messages = _value(asked, _PROMPTS)
    if isinstance(made := parsed(messages), list) and all(map(_is_message, made)):
        messages = made
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        raise BadRowError(
            "is an answer without its prompt; put the messages beside it (a batch's input has them by "
            "custom_id): {messages: [...], choices: [...]}",
            "choices",
        )
    system = _value(asked, _SYSTEMS)
    if isinstance(system, Mapping) and "parts" in system:
        system = system["parts"]
    return [*([{"role": "system", "content": system}] if system else []), *messages]


# Why a whole answer ends, where its API says so; any other reason is of one that is not whole.
_REASONS = ("finish_reason",)
_WHOLE_ENDS = {
    fields.plain(reason)
    for reason in (
        "", "stop", "end_turn", "stop_sequence", "tool_use", "tool_calls", "tool_call", "function_call",
        "completed", "complete",
        "eos", "eos_token", "unspecified", "finish_reason_unspecified",
    )
}  # fmt: skip


def _answer(answered: Mapping[str, Any] | None, values: Mapping[str, Any]) -> object:
    replies = _replies(answered or {})
    if not replies:
        why = "the request failed" if values.get("error") else "a request without its answer"
        raise BadRowError(
            f"is {why}; put the answer beside it (a batch's output has it by custom_id): "
            "{messages: [...], choices: [...]}",
            "response",
        )
    message, reason = replies[0]
    messages = of_items(message, "response.output") if isinstance(message, tuple) else [m for m, _ in replies]
    if not messages:
        raise BadRowError("holds no answer, only thinking that is not shown; leave the row out", "response")
    if len(messages) != 1:
        raise BadRowError(f"has {len(messages)} answers to one prompt; keep the one to learn", "choices")
    if not _is_whole(reason):
        raise _cut_off(reason, "choices")
    return messages[0]


def _is_whole(reason: object) -> bool:
    return reason is None or fields.plain(str(reason)) in _WHOLE_ENDS


def _cut_off(reason: object, place: str) -> BadRowError:
    return BadRowError(f"the answer was cut off ({reason}); leave the row out", place)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _with_answer(prompt: Sequence[Any], answer: object) -> Sequence[Any]:
    """The conversation that ends with the answer, which may stand in it already."""
    last = _turns(prompt[-1]) if prompt else ()
    if not last or last[-1].role != "assistant":
        return [*prompt, answer]
    if last != _turns(answer):
        raise BadRowError(
            "end with another answer than the one beside them; keep the one to learn", _MESSAGES
        )
    return prompt


def _turns(message: object) -> Sequence[Turn]:
    """The turns of a message; none of what `turns` refuses, which it says when the row is read."""
    try:
        return list(turns_of([message], _MESSAGES, {}, Notes()))
    except BadRowError:
        return ()
