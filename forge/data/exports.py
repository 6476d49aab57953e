"""Rows as services export them: ChatGPT, Claude, OpenAI's completions and batches, OpenAssistant's trees.

Each becomes a row of messages. What of it plays no part stays as a column, so that it is listed as unused; a
row that cannot be learned from holds the reason in place of its messages (`conversations` raises it). Not
covered: what an answer of a tool inside ChatGPT looked like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from forge.data.texts import BadRowError

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
    if at not in nodes:
        at = next((key for key in reversed(nodes) if not nodes[key].get("children")), None)
    path: list[str] = []
    while at in nodes and at not in path:
        path.insert(0, str(at))
        at = nodes[at].get("parent")
    row = _without(values, "mapping", "current_node")
    spoken = {key: node["message"] for key, node in nodes.items() if isinstance(node["message"], Mapping)}
    if others := [key for key in spoken if key not in path and _author(spoken[key]) != "system"]:
        row["mapping (other branches)"] = others
    try:
        row[_MESSAGES] = list(_chatgpt_messages([spoken[key] for key in path if key in spoken], row))
    except BadRowError as wrong:
        row[_MESSAGES] = wrong
    return row


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
        parts = content.get("parts", []) if isinstance(content, Mapping) else []
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
        else:
            yield {"role": role, "content": "".join(parts)}


def _of_claude(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Messages with a `sender`, each with its text twice: as blocks too, in newer exports."""
    messages = values["chat_messages"]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return None
    made: object = [_claude_message(message) for message in messages]
    for message in messages:
        for key in ("attachments", "files", "files_v2"):
            if message.get(key):
                made = BadRowError(
                    f"has {key}, which the answer rests on and the messages do not show; leave the row out",
                    "chat_messages",
                )
    return {**_without(values, "chat_messages"), _MESSAGES: made}


def _claude_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    blocks = [
        block
        for block in message.get("content") or ()
        if not (isinstance(block, Mapping) and block.get("type") == "token_budget")
    ]
    return {"role": message.get("sender"), "content": blocks or message.get("text")}


def _of_completion(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was asked of OpenAI's API and what it answered: stored, logged, or a batch's lines."""
    asked, answered = _asked(values), _answered(values)
    if not asked and not answered:
        return None
    row = _without(values, *(key for key in ("body", "request", "response", "choices") if key in values))
    for name, whole in (("request", asked), ("response", answered)):
        if whole is not values:
            row |= {
                f"{name}.{key}": whole[key] for key in whole if key not in (_MESSAGES, "choices", "tools")
            }
    tools = asked.get("tools") or values.get("tools")
    row |= {"tools": tools} if tools else {}
    messages = asked.get(_MESSAGES, asked.get("input"))
    if "input" in row and messages is row["input"]:
        del row["input"]
    try:
        row[_MESSAGES] = [*_prompt(messages), _answer(answered, values)]
    except BadRowError as wrong:
        row[_MESSAGES] = wrong
    return row


def _asked(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request: in a field of its own, or beside the answer."""
    for key in ("body", "request"):
        inside = values.get(key)
        if isinstance(inside, Mapping) and isinstance(inside.get("body"), Mapping):
            inside = inside["body"]
        if isinstance(inside, Mapping) and isinstance(inside.get(_MESSAGES), list):
            return inside
    return values if _is_answer(values) else {}


def _answered(values: Mapping[str, Any]) -> Mapping[str, Any]:
    inside = values.get("response")
    if isinstance(inside, Mapping) and isinstance(inside.get("body"), Mapping):
        inside = inside["body"]
    if isinstance(inside, Mapping) and _is_answer(inside):
        return inside
    return values if _is_answer(values) else {}


def _is_answer(value: object) -> bool:
    choices = value.get("choices") if isinstance(value, Mapping) else None
    return (
        isinstance(choices, list)
        and bool(choices)
        and isinstance(choices[0], Mapping)
        and "message" in choices[0]
    )


def _prompt(messages: object) -> Sequence[Any]:
    if not isinstance(messages, list) or not messages:
        raise BadRowError(
            "is an answer without its prompt; put the messages beside it (a batch's input has them by "
            "custom_id): {messages: [...], choices: [...]}",
            "choices",
        )
    return messages


def _answer(answered: Mapping[str, Any], values: Mapping[str, Any]) -> object:
    if not answered:
        why = "the request failed" if values.get("error") else "a request without its answer"
        raise BadRowError(
            f"is {why}; put the answer beside it (a batch's output has it by custom_id): "
            "{messages: [...], choices: [...]}",
            "response",
        )
    choices = answered["choices"]
    if len(choices) > 1:
        raise BadRowError(f"has {len(choices)} answers to one prompt; keep the one to learn", "choices")
    reason = choices[0].get("finish_reason")
    if reason in ("length", "content_filter"):
        raise BadRowError(f"the answer was cut off (finish_reason: {reason}); leave the row out", "choices")
    return choices[0]["message"]


def _of_tree(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A prompt with its `replies`, each with its own: at each turn the one that people ranked first."""
    node = values["prompt"]
    if not isinstance(node, Mapping) or not isinstance(node.get("replies"), list):
        return None
    messages: list[Mapping[str, Any]] = []
    others = 0
    while node is not None:
        messages.append({"role": node.get("role"), "content": node.get("text")})
        replies = [reply for reply in node.get("replies") or () if isinstance(reply, Mapping)]
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
    "choices": _of_completion,
    "response": _of_completion,
    "body": _of_completion,
    "request": _of_completion,
    "prompt": _of_tree,
    "input": _of_input,
}
