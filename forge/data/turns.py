"""Messages as rows hold them to typed turns: names of roles and keys, parts, tool calls, thinking, loss.

Raises `BadRowError` for what cannot be used; what was done to a row is counted in `Notes`. Not covered:
images and sound, which are refused by name; what a template makes of the turns (`tokens`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from forge.codec import Json
from forge.data import blocks, fields
from forge.data.conversation import ToolCall, Turn
from forge.data.texts import (
    BadRowError,
    Notes,
    is_words,
    parsed,
    text_of,
    thoughts,
    unwritable,
    writable,
)

_EMPTY: tuple[object, ...] = (None, "", [], {})


def _as_list(value: object, place: str) -> Sequence[Any]:
    """The messages in `value`: a list, a list in a text, or one list a key (a struct of lists)."""
    value = parsed(value)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        if beside := [key for key in value if key != "messages" and value[key] not in _EMPTY]:
            names = ", ".join(map(writable, beside))
            raise BadRowError(f"has {names} beside its messages; name the column {place}.messages", place)
        value = value["messages"]
    if isinstance(value, Mapping):
        columns = {key: items for key, items in value.items() if isinstance(items, list)}
        if columns and len({len(items) for items in columns.values()}) == 1:
            return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]
        if fields.message_part(next(iter(value), "")) or all(
            fields.plain(key) in fields.ROLES for key in value
        ):
            value = [value]
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        raise BadRowError("is a text that is neither JSON nor a Python list of messages", place)
    if not isinstance(value, list) or not value:
        what = "is a text, not a list of messages" if isinstance(value, str) else "is not a list of messages"
        way = f"; data.columns: {{prompt: {place}, completion: ...}} takes it as a question"
        raise BadRowError("is empty" if value in _EMPTY else what + way * isinstance(value, str), place)
    if all(isinstance(item, str) and item.lstrip().startswith("{") for item in value):
        value = list(map(parsed, value))
    if all(isinstance(item, (list, tuple)) and len(item) == 2 for item in value):
        value = list(_of_pairs(value))
    return [
        plain
        for message in blocks.of_items(value, place)
        for half in _halves(message)
        for plain in (blocks.plain_messages(half) if isinstance(half, Mapping) else [half])
    ]


def _of_pairs(pairs: Sequence[Any]) -> Iterator[Mapping[str, object]]:
    """The messages of [[role, text], ...] or of [[question, answer], ...]."""
    has_roles = all(isinstance(name, str) and fields.role_of(name, {}) for name, _ in pairs)
    for first, second in pairs:
        if has_roles:
            yield {"role": first, "content": second}
        else:
            yield {"role": "user", "content": first}
            yield {"role": "assistant", "content": second}


_ASKED = (*fields.ROW_FIELDS[fields.PROMPT], fields.INPUT)


def _of_langchain(message: object) -> object:
    """A message as LangChain keeps it: its role is its type, and its values may stand inside of it."""
    if not isinstance(message, Mapping) or any(fields.message_part(key) == fields.ROLE for key in message):
        return message
    kind, inside = message.get("type"), message.get("data")
    if isinstance(message.get("kwargs"), Mapping) and isinstance(message.get("id"), list) and message["id"]:
        kind, inside = str(message["id"][-1]).removesuffix("Message"), message["kwargs"]
    if str(kind).lower() not in ("human", "ai", "system", "tool"):
        return message
    values = inside if isinstance(inside, Mapping) else message
    return {"role": kind, **{key: value for key, value in values.items() if key != "type"}}


def _halves(message: object) -> Iterator[object]:
    """A message; several where one holds input and output (and system), or has a key for each role."""
    message = _of_langchain(message)
    if not isinstance(message, Mapping):
        yield message
        return
    if message and all(fields.plain(key) in fields.ROLES for key in message):
        # {user: ...}, or {human: ..., assistant: ...} for both
        yield from ({"role": key, "content": words} for key, words in message.items() if words is not None)
        return
    asked = [key for key in message if fields.plain(key) in _ASKED]
    answers = [key for key in message if fields.plain(key) in fields.ROW_FIELDS[fields.COMPLETION]]
    is_pair = len(asked) == len(answers) == 1 and not any(
        fields.message_part(key) == fields.ROLE for key in message
    )
    if not is_pair:
        yield message
        return
    rest = {key: value for key, value in message.items() if key not in ("system", *asked, *answers)}
    yield from [{"role": "system", "content": message["system"]}] if message.get("system") else []
    yield {"role": "user", "content": message[asked[0]]}
    yield {**rest, "role": "assistant", "content": message[answers[0]]}


def turns_of(value: object, place: str, roles: Mapping[str, str], notes: Notes) -> Iterator[Turn]:
    """The turns of a list of messages; `roles` are names of speakers beyond the usual ones."""
    if not roles and isinstance(value, list) and value and all(map(_is_usual, value)):
        yield from (Turn(message["role"], message["content"]) for message in value)
        return
    messages = _as_list(value, place)
    if all(isinstance(message, str) for message in messages):
        notes.counts["turns without a role, taken as user and assistant in turn"] += 1
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": message}
            for number, message in enumerate(messages)
        ]
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRowError("is not a list of messages", place)
        turn = _turn(message, f"{place}[{number}]", roles, notes)
        yield from [turn] if turn.role != "tool" else _unwrapped(turn, notes)


_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


def _unwrapped(turn: Turn, notes: Notes) -> Iterator[Turn]:
    """What tools answered, without the marks of Hermes' template around it, which a client does not send."""
    answers = _RESPONSE.findall(turn.content)
    if not answers or _RESPONSE.sub("", turn.content):
        yield turn
        return
    notes.counts["<tool_response> around what a tool answered is left to the template"] += 1
    yield from (replace(turn, content=answer) for answer in answers)


def _is_usual(message: object) -> bool:
    """Whether a message is a role and a text and needs nothing done to it: most are, and it saves time."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ("user", "assistant", "system")
        and isinstance(text := message.get("content"), str)
        and not text.isspace()
        and text != ""
        and not unwritable(text)
        and not _is_all_thinking(text)
    )


def _turn(message: Mapping[str, Any], place: str, roles: Mapping[str, str], notes: Notes) -> Turn:
    parts: dict[str, tuple[str, Any]] = {}
    for key, value in message.items():
        why = fields.MESSAGE_REFUSED.get(fields.plain(key))
        if why and value not in (None, "", [], {}, False):
            raise BadRowError(why, f"{place}.{key}")
        part = fields.message_part(key)
        if value is False and fields.plain(key) in fields.MESSAGE_ENDS:
            raise BadRowError("an answer is always learned with its end of turn", f"{place}.{key}")
        if fields.plain(key) == "channel" and value not in (None, "", "final"):
            raise BadRowError(
                f"is {value!r}: thinking stands beside the answer as reasoning_content, a call in tool_calls",
                f"{place}.{key}",
            )
        if part is None and fields.sets_loss(key, value):
            raise BadRowError(
                "forge does not know this key, and it may say what carries loss: weight: 0 (or 1) does; "
                "take it out if it does not",
                f"{place}.{key}",
            )
        if part is None and value not in (None, "", [], {}):
            notes.unused[f"{place.partition('[')[0]}[].{writable(key)}"] += 1
        elif part is not None and value not in _EMPTY:
            _add(parts, part, key, value, place, roles, notes)
        elif part is not None:
            parts.setdefault(part, (key, value))
    role, speaker = _role(parts, message, place, roles, notes)
    key, content = parts.get(fields.CONTENT, ("content", None))
    if fields.CONTENT not in parts and not {fields.TOOL_CALLS, fields.FUNCTION_CALL} & parts.keys():
        raise BadRowError("there is no such key", f"{place}.{key}")
    if role == "tool" and not is_words(content):
        content = json.dumps(content, ensure_ascii=False)
        notes.counts["what a tool answered is written as JSON"] += 1
    thought = ""
    if role == "assistant":
        thought, content = thoughts(content)
    calls = tuple(_calls(parts, role, content, place))
    if role == fields.CALL:
        role, content = "assistant", ""
    name = parts.get(fields.NAME, ("", None))[1]
    beside = text_of(parts.get(fields.REASONING, ("", None))[1], f"{place}.reasoning", empty_ok=True)
    if thought and beside:
        raise BadRowError("has thinking among its parts and beside them", f"{place}.{key}")
    text = text_of(content, f"{place}.{key}", empty_ok=bool(calls) or role in ("system", "tool"))
    is_repeated = bool(beside.strip()) and text.strip().startswith(
        beside.strip()
    )  # SWE-agent has its answers twice
    if beside and (role != "assistant" or is_repeated):
        notes.unused[f"{place.partition('[')[0]}[].{writable(parts[fields.REASONING][0])}"] += 1
        beside = ""
    trained = _trained(parts, role, place)
    if role == "assistant" and trained is not False and _is_all_thinking(text):
        raise BadRowError("<think> is never closed: the answer was cut off while thinking", f"{place}.{key}")
    return Turn(
        role,
        text,
        reasoning=text_of(thought, f"{place}.{key}", empty_ok=True) or beside,
        tool_calls=calls,
        tool_call_id=str(parts.get(fields.TOOL_CALL_ID, ("", None))[1] or ""),
        name=text_of(name, f"{place}.name", empty_ok=True) if speaker != name else "",
        trained=trained,
    )


def _add(
    parts: dict[str, tuple[str, Any]],
    part: str,
    key: str,
    value: object,
    place: str,
    roles: Mapping[str, str],
    notes: Notes,
) -> None:
    """Let `key` play this part; raises where another key plays it and says something else."""
    before, there = parts.get(part, ("", None))
    if part == fields.ROLE and there is not None:
        known = [fields.role_of(name, roles) for name in (there, value) if isinstance(name, str)]
        is_same = None in known or len(set(known)) < 2
        if None in known:  # the name of who speaks stands beside the role
            there = there if known[0] else None
            notes.unused[f"{place.partition('[')[0]}[].{writable(key if there else before)}"] += 1
    else:
        is_same = there == value or {fields.switch(there), fields.switch(value)} in ({True}, {False})
    if there in _EMPTY:
        parts[part] = (key, value)
    elif not is_same:
        raise BadRowError(f"{before} and {key} contradict each other", place)


def _is_all_thinking(text: str) -> bool:
    return text.lstrip().startswith("<think>") and "</think>" not in text


def _role(
    parts: Mapping[str, tuple[str, Any]],
    message: Mapping[str, Any],
    place: str,
    roles: Mapping[str, str],
    notes: Notes,
) -> tuple[str, str]:
    key, speaker = parts.get(fields.ROLE, ("role", None))
    if speaker is None and "parts" in message:  # Gemini's user need not say so
        speaker = "user"
    if speaker is None and (is_user := fields.switch(parts.get(fields.IS_USER, ("", None))[1])) is not None:
        speaker = "user" if is_user else "assistant"
    if isinstance(speaker, Mapping):  # ChatGPT's export
        speaker = speaker.get("role", speaker.get("name"))
    role = fields.role_of(speaker, roles) if isinstance(speaker, str) else None
    if role is None:
        if speaker is None:
            raise BadRowError(f"{key} is missing; its keys are: {', '.join(map(writable, message))}", place)
        raise BadRowError(
            f"{key} {speaker!r} is none of: {', '.join(fields.ROLES)}; "
            "data.roles: {NAME: user} adds a name",
            place,
        )
    if speaker != role:
        notes.roles[speaker] = role
    return role, speaker


def _trained(parts: Mapping[str, tuple[str, Any]], role: str, place: str) -> bool | None:
    """What a message says of its own loss: `weight: 0`, `train: false` and their kind."""
    carries: set[bool] = set()
    for part in (fields.WEIGHT, fields.TRAINED, fields.MASKED):
        key, value = parts.get(part, ("", None))
        if value is None:
            continue
        on = fields.switch(value)
        if on is None:
            raise BadRowError(f"is {value!r}; only 0 and 1 (false and true) are supported", f"{place}.{key}")
        if part == fields.MASKED:
            carries |= {False} if on else set()
            continue
        if on and part == fields.TRAINED and role != "assistant":
            raise BadRowError(f"a turn of the {role} cannot carry loss here", f"{place}.{key}")
        carries.add(on)
    if len(carries) > 1:
        raise BadRowError("its keys contradict each other about the loss", place)
    return next(iter(carries), None) if role == "assistant" else None


def _calls(
    parts: Mapping[str, tuple[str, Any]], role: str, content: object, place: str
) -> Iterator[ToolCall]:
    where = f"{place}.tool_calls"
    listed = calls_of(parts.get(fields.TOOL_CALLS, ("", None))[1], where)
    single = parsed(parts.get(fields.FUNCTION_CALL, ("", None))[1])
    spoken = parsed(content) if role == fields.CALL else None
    if role == fields.CALL and not isinstance(spoken, (list, Mapping)):
        raise BadRowError("a function call must be JSON: {name: ..., arguments: ...}", place)
    spoken_list = spoken if isinstance(spoken, list) else [spoken] if spoken else []
    for call in [*listed, *calls_of([single] if single else [], where), *calls_of(spoken_list, where)]:
        if role not in ("assistant", fields.CALL):
            raise BadRowError(f"a turn of the {role} cannot call a tool", where)
        yield call


def calls_of(value: object, place: str) -> tuple[ToolCall, ...]:
    """The calls in a list of {name: ..., arguments: ...}, or of OpenAI's `tool_calls`."""
    listed = parsed(value)
    if listed in _EMPTY:
        return ()
    if not isinstance(listed, list):
        raise BadRowError("is not a list of calls", place)
    return tuple(_call(call, place) for call in listed)


_OF_CALL = {
    "name", "arguments", "parameters", "args", "input", "id", "call_id", "type", "index", "description",
    "response", "status", "caller",
}  # fmt: skip


def _call(call: object, place: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRowError("a call needs a name and arguments", place)
    if unknown := [key for key in function if key not in _OF_CALL and function[key] not in _EMPTY]:
        raise BadRowError(f"a call has name and arguments, not {', '.join(map(writable, unknown))}", place)
    key = next((key for key in ("arguments", "parameters", "args", "input") if key in function), "arguments")
    arguments = parsed(function.get(key))
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise BadRowError("the arguments of a call are not a JSON object", place)
    text_of(json.dumps([function["name"], arguments], ensure_ascii=False), place)
    number = call.get("id") if isinstance(call, Mapping) else None
    return ToolCall(function["name"], dict(arguments), str(number or ""))


def tools_of(value: object, place: str) -> tuple[Mapping[str, Json], ...]:
    """The functions of a row's `tools`, each as {type: function, function: {...}}."""
    if value in _EMPTY:
        return ()
    listed = blocks.plain_tools(parsed(value))
    if listed in (None, "", []):
        return ()
    if not isinstance(listed, list):
        raise BadRowError("is not a list of tools", place)
    return tuple(_tool(parsed(item), f"{place}[{number}]") for number, item in enumerate(listed))


def _tool(tool: object, place: str) -> Mapping[str, Json]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(tool, Mapping) or not isinstance(name, str) or not name:
        raise BadRowError(
            "a tool needs a name: {type: function, function: {name: ..., parameters: ...}}", place
        )
    text_of(json.dumps(tool, ensure_ascii=False), place)
    if "function" in tool:
        return dict(tool)
    # OpenAI's responses have the type beside the name.
    inside = {key: value for key, value in tool.items() if key != "type" or value != "function"}
    return {"type": "function", "function": inside}


def finished(turns: Sequence[Turn], notes: Notes) -> tuple[Turn, ...]:
    """The turns without empty system turns and without what follows the last answer.

    Raises `BadRowError` where no answer or no user is left.
    """
    kept = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
    leading = next((at for at, turn in enumerate(kept) if turn.role != "system"), len(kept))
    if leading > 1:
        texts = list(dict.fromkeys(turn.content for turn in kept[:leading]))
        if len(texts) > 1:
            notes.counts["several system turns at the start, joined into one"] += 1
        kept[:leading] = [Turn("system", "\n\n".join(texts))]
    if kept and kept[0].role == "assistant" and kept[0].trained is None:
        # A server cannot be asked for what comes before any message.
        notes.counts["an answer before any question carries no loss: nothing prompts it"] += 1
        kept[0] = replace(kept[0], trained=False)
    answers = [at for at, turn in enumerate(kept) if turn.role == "assistant"]
    if not answers:
        raise BadRowError("there is no turn of the assistant: there is nothing to learn")
    if len(kept) > answers[-1] + 1:
        notes.counts["what follows the last answer was cut: nothing in it is learned"] += 1
        del kept[answers[-1] + 1 :]
    if not any(turn.role == "user" for turn in kept):
        raise BadRowError("no message is the user's")
    return tuple(kept)
