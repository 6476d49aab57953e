"""Rows as services export them: ChatGPT, Claude, logs and batches of APIs, OpenAssistant's trees.

Each becomes a row of messages. What of it plays no part stays as a column, so that it is listed as unused; a
row that cannot be learned from holds the reason in place of its messages (`conversations` raises it). Not
covered: what an answer of a tool inside ChatGPT looked like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from forge.data import fields
from forge.data.conversation import Turn
from forge.data.texts import TOO_DEEP, BadRowError, Notes, parsed
from forge.data.turns import turns_of

_MESSAGES = "messages"


def plain_row(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row that an export's record is; any other row as it is."""
    for mark, kind in _KINDS.items():
        if mark in values and (made := kind(values)) is not None:
            return made
    return values


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _of_chatgpt(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A tree of messages, of which the path to `current_node` is the conversation that was seen last."""
    nodes = values["mapping"]
    if not isinstance(nodes, Mapping) or not all(
        isinstance(node, Mapping) and "message" in node for node in nodes.values()
    ):
        return None
    at = values.get("current_node")
    if not isinstance(at, str) or at not in nodes:
        at = next((key for key in reversed(nodes) if not nodes[key].get("children")), None)
    path = _path(nodes, at, "parent")
    row = _without(values, "mapping", "current_node")
    spoken = {key: node["message"] for key, node in nodes.items() if isinstance(node["message"], Mapping)}
    if others := [key for key in spoken if key not in path and _author(spoken[key]) != "system"]:
        row["mapping (other branches)"] = others
    try:
        row[_MESSAGES] = list(_chatgpt_messages([spoken[key] for key in path if key in spoken], row))
    except BadRowError as wrong:
        row[_MESSAGES] = wrong
    return row


def _path(nodes: Mapping[str, Mapping[str, Any]], at: object, parent: str) -> list[str]:
    """The keys of the nodes from the root to the node `at`."""
    path: list[str] = []
    while isinstance(at, str) and at in nodes and at not in path:
        path.insert(0, at)
        at = nodes[at].get(parent)
    return path


_WHOLE = "finished_successfully"
_BESIDE = ("thoughts", "reasoning_recap", "user_editable_context", "model_editable_context")


def _author(message: Mapping[str, Any]) -> str:
    author = message.get("author")
    return str(author.get("role")) if isinstance(author, Mapping) else ""


def _chatgpt_messages(
    spoken: Sequence[Mapping[str, Any]], row: dict[str, Any]
) -> Iterator[Mapping[str, Any]]:
    for message in spoken:
        content, role = message.get("content"), _author(message)
        kind = content.get("content_type") if isinstance(content, Mapping) else None
        parts = content.get("parts") if isinstance(content, Mapping) else None
        parts = [] if parts is None else parts if isinstance(parts, list) else [parts]
        if kind in _BESIDE:
            row[f"mapping (content of type {kind})"] = True
        elif role in ("system", "assistant") and kind == "text" and not any(parts):
            continue
        elif role == "tool" or message.get("recipient", "all") != "all":
            tool = message.get("recipient") if role != "tool" else message["author"].get("name")
            raise BadRowError(
                f"uses a tool of ChatGPT's own ({tool or 'tool'}), which the model will not have; "
                "leave the row out",
                "mapping",
            )
        elif kind != "text" or not all(isinstance(part, str) for part in parts):
            raise BadRowError(f"has content of type {kind}; only text can be learned here", "mapping")
        elif role == "assistant" and message.get("status", _WHOLE) != _WHOLE:
            raise BadRowError(f"an answer was cut off ({message['status']}); leave the row out", "mapping")
        elif role == "assistant" and message.get("end_turn") is False:
            raise BadRowError(
                "an answer goes on in another message (end_turn: false); leave the row out", "mapping"
            )
        else:
            yield {"role": role, "content": "".join(parts)}


def _of_claude(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Messages with a `sender`, each with its text twice: as blocks too, in newer exports.

    Where two of them answer one message, those that lead to the last are the conversation.
    """
    messages = values["chat_messages"]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return None
    row = _without(values, "chat_messages")
    parents = [parent for message in messages if isinstance(parent := message.get(_PARENT), str)]
    if len(set(parents)) < len(parents):
        nodes = {str(message.get("uuid")): message for message in messages}
        path = _path(nodes, str(messages[-1].get("uuid")), _PARENT)
        if len(nodes) < len(messages):
            why = "has branches, and messages without a uuid of their own; leave the row out"
            return {**row, _MESSAGES: BadRowError(why, "chat_messages")}
        row["chat_messages (other branches)"] = [key for key in nodes if key not in path]
        messages = [nodes[key] for key in path]
    row[_MESSAGES] = [_claude_message(message) for message in messages]
    for message in messages:
        for key in ("attachments", "files", "files_v2"):
            if message.get(key):
                row[_MESSAGES] = BadRowError(
                    f"has {key}, which the answer rests on and the messages do not show; leave the row out",
                    "chat_messages",
                )
    return row


_PARENT = "parent_message_uuid"


def _claude_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        content = [
            block
            for block in content
            if not (isinstance(block, Mapping) and block.get("type") == "token_budget")
        ]
    return {"role": message.get("sender"), "content": content or message.get("text")}


def _of_call(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
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
            rest = _without(rest, name, "body")
            rest |= {f"{name}.{key}": value for key, value in whole.items()}
    asked = values if asked is None else asked
    beside = "" if asked is values else "request."
    keys = [_key(asked, names) for names in (_PROMPTS, _SYSTEMS, _TOOLS)]
    used = [f"{beside}{key}" for key in (*keys, "tools") if key is not None]
    used += ["choices", "candidates"] if answered is values else [f"response.{key}" for key in _ANSWERS]
    used += ["message"] if answered is values and "done" in values else []
    tools = _value(asked, _TOOLS) or values.get("tools")
    row = {**_without(rest, *used), **({"tools": tools} if tools else {})}
    if asked is not values and values.get(_MESSAGES):
        row[f"{_MESSAGES} (beside the request)"] = True
    if answered is not None and any(_kind(item) == "reasoning" for item in _items(answered)):
        row["response.output (reasoning)"] = True
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
_TOOLS = ("tools", "functions")
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
    return {**config, **_without(values, "config")} if is_request and config else values


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
    is_call = "choices" in values or "candidates" in values or {"message", "done"} <= values.keys()
    return values if is_call and _replies(values) else None


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
    return [
        (_only(item, "role", "content"), whole.get("status"))
        for item in _items(whole)
        if _kind(item) == "message"
    ]


def _ollama_reason(whole: Mapping[str, Any]) -> object:
    return whole.get("done_reason") if whole["done"] is True else "not done"


def _items(whole: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What OpenAI's responses answer with: messages, and what else the model put out."""
    output = whole.get("output")
    is_answer = isinstance(output, list) and all(
        isinstance(item, Mapping) and ("type" in item or _has(item, "content")) for item in output
    )
    return output if is_answer and isinstance(output, list) else []


def _kind(item: Mapping[str, Any]) -> object:
    return item.get("type", "message")


def _has(value: object, key: str) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get(key), (Mapping, list))


def _only(values: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    return {key: values[key] for key in names if key in values}


def _prompt(asked: Mapping[str, Any]) -> Sequence[Any]:
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
        "", "stop", "end_turn", "stop_sequence", "tool_use", "tool_calls", "function_call", "completed",
        "eos", "eos_token", "unspecified", "finish_reason_unspecified",
    )
}  # fmt: skip


def _answer(answered: Mapping[str, Any] | None, values: Mapping[str, Any]) -> object:
    for item in _items(answered or {}):
        if _kind(item) not in ("message", "reasoning"):
            raise BadRowError(
                f"an answer of the responses API calls a tool ({_kind(item)}); write it as tool_calls",
                "response",
            )
    replies = _replies(answered or {})
    if not replies:
        why = "the request failed" if values.get("error") else "a request without its answer"
        raise BadRowError(
            f"is {why}; put the answer beside it (a batch's output has it by custom_id): "
            "{messages: [...], choices: [...]}",
            "response",
        )
    if len(replies) > 1:
        raise BadRowError(f"has {len(replies)} answers to one prompt; keep the one to learn", "choices")
    ((message, reason),) = replies
    if not _is_whole(reason):
        raise _cut_off(reason, "choices")
    return message


def _is_whole(reason: object) -> bool:
    return reason is None or fields.plain(str(reason)) in _WHOLE_ENDS


def _cut_off(reason: object, place: str) -> BadRowError:
    return BadRowError(f"the answer was cut off ({reason}); leave the row out", place)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _with_answer(prompt: Sequence[Any], answer: object) -> Sequence[Any]:
    """The conversation that ends with the answer, which may stand in it already."""
    last = _turns(prompt[-1])
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


def _of_data(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A row inside of one."""
    inside = values["data"]
    if not isinstance(inside, Mapping) or not isinstance(inside.get(_MESSAGES), list):
        return None
    return {**_without(values, "data"), **inside}


def _of_tree(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A prompt with its `replies`, each with its own: at each turn the one that people ranked first."""
    node = values["prompt"]
    if not isinstance(node, Mapping) or not isinstance(node.get("replies"), list):
        return None
    messages: list[Mapping[str, Any]] = []
    others = 0
    while node is not None:
        messages.append({"role": node.get("role"), "content": node.get("text")})
        listed = node.get("replies")
        replies = (
            [reply for reply in listed if isinstance(reply, Mapping)] if isinstance(listed, list) else []
        )
        others += max(0, len(replies) - 1)
        node = min(replies, key=_rank, default=None)
    beside = {"prompt (other replies)": others} if others else {}
    return {**_without(values, "prompt"), **beside, _MESSAGES: messages}


def _rank(reply: Mapping[str, Any]) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, (int, float)) else float("inf")


def _of_input(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`input` holds the messages and their tools, as OpenAI's preference pairs do."""
    value = values["input"]
    if not isinstance(value, Mapping) or _MESSAGES not in value:
        return None
    return {**_without(values, "input"), **value}


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any] | None]] = {
    "mapping": _of_chatgpt,
    "chat_messages": _of_claude,
    **dict.fromkeys(("choices", "candidates", "response", "body", "request", "message"), _of_call),
    "prompt": _of_tree,
    "input": _of_input,
    "data": _of_data,
}
