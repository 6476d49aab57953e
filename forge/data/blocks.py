"""Messages of blocks, as Anthropic, Bedrock and Gemini write them, and items of OpenAI's responses, in the
form of OpenAI's chat completions.

A call among the blocks becomes one of `tool_calls`, a tool's answer a turn of the role tool, thinking a part
of type thinking; tools in their spelling become functions with `parameters`. What is none of these is left
as it is, for `turns` to read or to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forge.data import fields
from forge.data.texts import BadRowError

_CALLS = ("toolUse", "functionCall", "function_call")
_RESULTS = ("toolResult", "functionResponse", "function_response")
_SCHEMA_TYPES = {"STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL"}


_CALL_ITEM, _RESULT_ITEM, _THOUGHT_ITEM = "function_call", "function_call_output", "reasoning"
_THOUGHT = "reasoning_content"


def of_items(items: Sequence[Any], place: str) -> Sequence[Any]:
    """The messages of a list in which calls, their outputs and thinking are items beside them.

    Calls belong to the message before them, thinking to the message or the call behind it. Raises
    `BadRowError` for thinking without either, and for any other item.
    """
    if not any(map(_is_item, items)):
        return items
    messages: list[Any] = []
    answer: dict[str, Any] | None = None  # the turn that the model is still at
    thought: dict[str, Any] = {}
    for number, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, Mapping) else "message"
        where = f"{place}[{number}]"
        if isinstance(item, Mapping) and item.get("status") in ("incomplete", "in_progress", "failed"):
            raise BadRowError(f"was cut off ({item['status']}); leave the row out", where)
        if kind == _THOUGHT_ITEM:
            thought = _joined(thought, _thought(item))
        elif kind == _CALL_ITEM:
            if answer is None:
                answer = {"role": "assistant", "content": ""}
                messages.append(answer)
            elif _THOUGHT in thought:
                raise BadRowError("is a call of a turn that began before its thinking", where)
            answer |= thought
            thought = {}
            call = {"id": item.get("call_id"), "name": item.get("name"), "arguments": item.get("arguments")}
            calls = answer.get("tool_calls") or []
            if not isinstance(calls, list):
                raise BadRowError("is a call behind a message whose tool_calls are no list", where)
            answer["tool_calls"] = [*calls, call]
        elif isinstance(item, Mapping) and item.get("role") == "assistant":
            if _THOUGHT in thought and item.get(_THOUGHT):
                raise BadRowError("has thinking of its own, and thinking as an item before it", where)
            answer = {**without(item, "status", "type"), **thought}
            thought = {}
            messages.append(answer)
        elif _is_item(item) and kind != _RESULT_ITEM and not _is_message(item):
            raise BadRowError(
                f"is a {kind} of the responses API: only messages, reasoning, function_call and "
                "function_call_output can be learned here",
                where,
            )
        else:
            _refuse_thinking(thought, where)
            answer = None
            messages.append(_of_others(item))
    _refuse_thinking(thought, f"{place}[{len(items) - 1}]")
    return messages


def _of_others(item: Any) -> Any:
    """A turn that the model did not write, as a message."""
    if not isinstance(item, Mapping):
        return item
    if item.get("type") == _RESULT_ITEM:
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    return without(item, "status", "type")


def _refuse_thinking(thought: Mapping[str, Any], place: str) -> None:
    if thought:
        raise BadRowError("thinking stands here with neither a message nor a call behind it", place)


def _joined(thought: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Thinking that was put out as several items."""
    texts = [part[_THOUGHT] for part in (thought, more) if part.get(_THOUGHT)]
    return {**thought, **more, **({_THOUGHT: "\n\n".join(texts)} if texts else {})}


def without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _is_item(item: object) -> bool:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or not isinstance(kind, str):
        return False
    is_own = kind == _THOUGHT_ITEM or kind.endswith(("_call", "_call_output"))
    return (is_own or kind == "message") and _is_message(item) == (kind == "message")


def _is_message(item: Mapping[str, Any]) -> bool:
    return any(fields.message_part(key) == fields.ROLE for key in item)


def _thought(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """An item of reasoning: its text where there is one, not the summary, which is other words."""
    content = item.get("content")
    parts: list[Any] = content if isinstance(content, list) else [{"text": content}]
    text = "".join(
        part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)
    )
    beside = {f"reasoning.{key}": item[key] for key in ("summary", "encrypted_content") if item.get(key)}
    return {**({_THOUGHT: text} if text else {}), **beside}


def plain_messages(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The message, or the several that its blocks are: what tools answered first, then what is left.

    Raises `BadRowError` where it holds calls as well, since their order would be lost.
    """
    key = next((key for key in message if fields.message_part(key) == fields.CONTENT), None)
    blocks = message.get(key) if key else None
    if not isinstance(blocks, list) or not any(map(_is_special, blocks)):
        yield message
        return
    calls = [call for block in blocks if (call := _call(block))]
    results = [result for block in blocks if (result := _result(block))]
    if calls and results:
        raise BadRowError("a message holds a call and what the tool answered; make turns of both", str(key))
    rest = [_part(block) for block in blocks if not _call(block) and not _result(block)]
    yield from results
    if rest or calls or not results:
        made: dict[str, object] = {**message, str(key): rest}
        yield {**made, "tool_calls": [*(message.get("tool_calls") or ()), *calls]} if calls else made


def _is_special(block: object) -> bool:
    return bool(_call(block) or _result(block)) or _part(block) is not block


def _call(block: object) -> Mapping[str, Any] | None:
    if not isinstance(block, Mapping):
        return None
    own = next((block[key] for key in _CALLS if isinstance(block.get(key), Mapping)), None)
    if block.get("type") == "tool_use":
        own = block
    if own is None:
        return None
    arguments = own.get("input", own.get("args"))
    return {
        "id": str(own.get("id") or own.get("toolUseId") or ""),
        "function": {"name": own.get("name"), "arguments": {} if arguments is None else arguments},
    }


def _result(block: object) -> Mapping[str, Any] | None:
    """A tool's answer as a turn of its own."""
    if not isinstance(block, Mapping):
        return None
    own = next((block[key] for key in _RESULTS if isinstance(block.get(key), Mapping)), None)
    if block.get("type") == "tool_result":
        own = block
    if own is None:
        return None
    content = own.get("content", own.get("response"))
    if isinstance(content, list):
        content = [
            {"type": "text", "text": _written(part["json"])} if _is_json(part) else part for part in content
        ]
    elif not isinstance(content, str):
        content = _written(content)
    return {
        "role": "tool",
        "content": content,
        "tool_call_id": str(own.get("tool_use_id") or own.get("toolUseId") or own.get("id") or ""),
        "name": own.get("name"),
        "is_error": own.get("is_error") or None,
    }


def _is_json(part: object) -> bool:
    return isinstance(part, Mapping) and set(part) == {"json"}


def _written(value: object) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _part(block: object) -> object:
    """Thinking as a part of that type."""
    if not isinstance(block, Mapping):
        return block
    if block.get("thought") is True and isinstance(block.get("text"), str):
        return {"type": "thinking", "thinking": block["text"]}
    reasoning = block.get("reasoningContent")
    text = reasoning.get("reasoningText") if isinstance(reasoning, Mapping) else None
    if isinstance(text, Mapping) and isinstance(text.get("text"), str):
        return {"type": "thinking", "thinking": text["text"]}
    return block


def plain_tools(tools: object) -> object:
    """The tools of a row as a list of functions with `parameters`, where another API's spelling is clear."""
    if isinstance(tools, Mapping) and isinstance(tools.get("tools"), list):  # Bedrock's toolConfig
        tools = tools["tools"]
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list):
        return tools
    return [function for tool in tools for function in _functions(tool)]


def _functions(tool: object) -> Iterator[object]:
    if not isinstance(tool, Mapping):
        yield tool
        return
    declared = tool.get("functionDeclarations", tool.get("function_declarations"))
    specified = tool.get("toolSpec")
    if isinstance(declared, list):
        yield from (_with_json_types(function) for function in declared)
    elif isinstance(specified, Mapping):
        schema = specified.get("inputSchema")
        rest = {key: value for key, value in specified.items() if key != "inputSchema"}
        yield {**rest, "parameters": schema.get("json", schema)} if isinstance(schema, Mapping) else rest
    elif isinstance(tool.get("input_schema"), Mapping) and "parameters" not in tool:
        rest = {
            key: value for key, value in tool.items() if key not in ("input_schema", "cache_control", "type")
        }
        yield {**rest, "parameters": tool["input_schema"]}
    else:
        yield tool


def _with_json_types(schema: Any) -> Any:
    """Gemini's schemas name their types in capitals."""
    if isinstance(schema, list):
        return [_with_json_types(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value.lower()
        if key == "type" and isinstance(value, str) and value in _SCHEMA_TYPES
        else _with_json_types(value)
        for key, value in schema.items()
    }
