"""Messages whose content stands in blocks, as Anthropic, Bedrock and Gemini write it, in OpenAI's form.

A call among the blocks becomes one of `tool_calls`, a tool's answer a turn of the role tool, thinking a part
of type thinking; tools in their spelling become functions with `parameters`. What is none of these is left
as it is, for `turns` to read or to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from forge.data import fields

_CALLS = ("toolUse", "functionCall", "function_call")
_RESULTS = ("toolResult", "functionResponse", "function_response")
_SCHEMA_TYPES = {"STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL"}


def plain_messages(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The message, or the several that its blocks are: what tools answered first, then what is left."""
    key = next((key for key in message if fields.message_part(key) == fields.CONTENT), None)
    blocks = message.get(key) if key else None
    if not isinstance(blocks, list) or not any(map(_is_special, blocks)):
        yield message
        return
    calls = [call for block in blocks if (call := _call(block))]
    results = [result for block in blocks if (result := _result(block))]
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
