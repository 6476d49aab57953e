"""Rows as services export them: ChatGPT, Claude, Open WebUI, AI Studio, OpenAssistant's trees.

Logs of APIs are in `logs`, exports that do not say what is to be learned in `unclear`.

Each becomes a row of messages. What of it plays no part stays as a column, so that it is listed as unused; a
row that cannot be learned from holds the reason in place of its messages (`conversations` raises it). Not
covered: what an answer of a tool inside ChatGPT looked like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from forge.data.blocks import without
from forge.data.logs import of_call
from forge.data.texts import BadRowError

_MESSAGES = "messages"


def plain_row(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row that an export's record is; any other row as it is."""
    if _KINDS.keys().isdisjoint(values):
        return values
    for mark, kind in _KINDS.items():
        if mark in values and (made := kind(values)) is not None:
            return made
    return values


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
    row = without(values, "mapping", "current_node")
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
    row = without(values, "chat_messages")
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


def _within(key: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    """A row inside of one, under this key: what both have keeps the path of the inner one."""

    def of(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
        inside = values[key]
        if not isinstance(inside, Mapping) or _MESSAGES not in inside or _MESSAGES in values:
            return None
        row = without(values, key)
        return row | {f"{key}.{name}" if name in row else name: value for name, value in inside.items()}

    return of


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
    return {**without(values, "prompt"), **beside, _MESSAGES: messages}


def _rank(reply: Mapping[str, Any]) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, (int, float)) else float("inf")


def _of_chat(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Open WebUI's: messages, which may be a tree, of which the path to `currentId` was seen last."""
    chat = values["chat"]
    if not isinstance(chat, Mapping) or _MESSAGES in values:
        return None
    history = chat.get("history")
    nodes = history.get(_MESSAGES) if isinstance(history, Mapping) else None
    nodes = nodes if isinstance(nodes, Mapping) else {}
    path = _path(nodes, history.get("currentId"), "parentId") if isinstance(history, Mapping) else []
    messages = [nodes[key] for key in path] or chat.get(_MESSAGES)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return None
    row = without(values, "chat")
    row |= {
        f"chat.{key}" if key in row else key: chat[key] for key in chat if key not in ("history", _MESSAGES)
    }
    if others := [key for key in nodes if key not in path and path]:
        row["chat (other branches)"] = others
    params = chat.get("params")
    if isinstance(params, Mapping) and params.get("system"):
        row |= {"system": params["system"], "params": without(params, "system")}
    try:
        for message in messages:
            _refuse_hidden(message)
        row[_MESSAGES] = messages
    except BadRowError as wrong:
        row[_MESSAGES] = wrong
    return row


_OWN_MARKS = '<details type="'


def _refuse_hidden(message: Mapping[str, Any]) -> None:
    """Refuse a message of Open WebUI's whose text is not all of it."""
    content = message.get("content")
    for key in ("files", "sources", "error"):
        if message.get(key):
            raise BadRowError(f"a message has {key}, which the text does not show; leave the row out", "chat")
    if message.get("done") is False:
        raise BadRowError("an answer was cut off (done: false); leave the row out", "chat")
    if isinstance(content, str) and _OWN_MARKS in content:
        kind = content.partition(_OWN_MARKS)[2].partition('"')[0]
        raise BadRowError(
            f"holds Open WebUI's own marks of {kind} (<details>), which no template writes; leave the row "
            "out, or data.format: module:function makes messages of it",
            "chat",
        )


def _of_ai_studio(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Google AI Studio's prompt as Drive keeps it: chunks of texts and of the model's thinking."""
    prompt = values["chunkedPrompt"]
    chunks = prompt.get("chunks") if isinstance(prompt, Mapping) else None
    if not isinstance(chunks, list) or not all(isinstance(chunk, Mapping) for chunk in chunks):
        return None
    row = without(values, "chunkedPrompt")
    try:
        row[_MESSAGES] = list(_ai_studio_messages(chunks))
    except BadRowError as wrong:
        row[_MESSAGES] = wrong
    return row


_OF_CHUNK = {
    "text", "parts", "role", "tokenCount", "isThought", "finishReason", "thinkingBudget", "createTime",
    "thoughtSignatures", "isEdited", "id",
}  # fmt: skip


def _ai_studio_messages(chunks: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    thought, before = "", ""
    for number, chunk in enumerate(chunks):
        place, role, text = f"chunkedPrompt.chunks[{number}]", chunk.get("role"), chunk.get("text")
        if others := [key for key in chunk if key not in _OF_CHUNK and chunk[key]]:
            raise BadRowError(f"has {', '.join(others)}; only text can be learned here", place)
        if not isinstance(text, str):
            raise BadRowError("has no text", place)
        if role != "model":
            yield {"role": role, "content": text}
        elif chunk.get("isThought"):
            thought += text
        elif before == role:
            raise BadRowError("an answer goes on in another chunk; leave the row out", place)
        elif (reason := chunk.get("finishReason", "STOP")) != "STOP":
            raise BadRowError(f"the answer was cut off ({reason}); leave the row out", place)
        else:
            yield {"role": role, "content": text, "reasoning_content": thought}
            thought = ""
        before = before if chunk.get("isThought") else str(role)
    if thought:
        raise BadRowError("ends with thinking without an answer; leave the row out", "chunkedPrompt")


def _of_prodigy(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Prodigy's `answer` is the annotator's verdict on the task, not what is to be learned."""
    verdict = values.get("answer")
    if verdict not in ("accept", "reject", "ignore"):
        return None
    return {**without(values, "answer"), "train": verdict == "accept"}


def _of_swift(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A conversation whose last answer is the chosen one, with the rejected one beside it."""
    messages, rejected = values.get(_MESSAGES), values["rejected_response"]
    if not isinstance(messages, list) or not messages or not rejected or "chosen" in values:
        return None
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return None
    row = without(values, _MESSAGES, "rejected_response")
    return {**row, "prompt": messages[:-1], "chosen": [last], "rejected": rejected}


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any] | None]] = {
    "mapping": _of_chatgpt,
    "chat_messages": _of_claude,
    **dict.fromkeys(("choices", "candidates", "response", "body", "request", "message", "object"), of_call),
    "prompt": _of_tree,
    "chat": _of_chat,
    **{key: _within(key) for key in ("input", "data", "conversation", "conversations", "dialogue", "dialog")},
    "rejected_response": _of_swift,
    "chunkedPrompt": _of_ai_studio,
    "_task_hash": _of_prodigy,
}
