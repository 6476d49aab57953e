"""What is odd about a row's calls and the answers to them: noted, since a template writes it all the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from forge.codec import Json
from forge.data.conversation import Turn
from forge.data.texts import Notes

_NOT_SHOWN = "calls of a row without tools: a server's model is shown what it may call"
_NOT_LISTED = "calls of a function that the row's tools do not list: {}"
_NOT_CALLED = "an answer of a tool that nothing called"
_OTHER_ORDER = "answers of tools in another order than their calls, whose ids most templates do not write"


def note_calls(turns: Sequence[Turn], tools: Sequence[Mapping[str, Json]], notes: Notes) -> None:
    """Count the row once for each thing that is odd about its calls."""
    if any(turn.tool_calls or turn.role == "tool" for turn in turns):
        notes.counts.update({*_of_names(turns, tools), *_of_answers(turns)})


def _of_names(turns: Sequence[Turn], tools: Sequence[Mapping[str, Json]]) -> Iterator[str]:
    functions = [tool.get("function") for tool in tools]
    listed = {function.get("name") for function in functions if isinstance(function, Mapping)}
    for turn in turns:
        for call in turn.tool_calls:
            if not tools:
                yield _NOT_SHOWN
            elif call.name not in listed:
                yield _NOT_LISTED.format(call.name)


def _of_answers(turns: Sequence[Turn]) -> Iterator[str]:
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "assistant":
            waiting = [call.id for call in turn.tool_calls]
        elif turn.role == "tool":
            if not waiting:
                yield _NOT_CALLED
            elif turn.tool_call_id in waiting[1:] and turn.tool_call_id != waiting[0]:
                yield _OTHER_ORDER
                waiting.remove(turn.tool_call_id)
            else:
                waiting.pop(0)
