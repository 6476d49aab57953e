"""A few questions to a live server whose answers show that the model does what it was made for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from forge.errors import CheckError, Problem, RecipeError
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint
from forge.serve.queries import Answer, Call, Query
from forge.serve.wire import Reply, Sampling


def run_smoke(endpoint: Endpoint, queries: Sequence[Query], *, seed: int = 0) -> list[Answer]:
    """Ask every query at temperature 0, in order.

    An answer is ok when its pattern is found in it (`re.search`) and it ended by itself; one that
    nothing is expected of is ok unless it is blank. Raises `RecipeError` for all patterns that
    are no regular expressions before anything is asked, and what `Client.chat` raises.
    """
    patterns = _compiled(queries)
    answers: list[Answer] = []
    with Client(endpoint) as client:
        for query, pattern in zip(queries, patterns, strict=True):
            sampling = Sampling(max_tokens=query.max_tokens, seed=seed, tools=query.tools)
            reply = client.chat(query.messages, sampling)
            prompt = next(turn["content"] for turn in reversed(query.messages) if turn["role"] == "user")
            ok = _is_ok(reply, pattern, query)
            wishes = [str(wish) for wish in (query.expect, query.expect_call) if wish is not None]
            expected = " and ".join(wishes)
            answers.append(Answer(prompt, _shown(reply), ok, reply.finish_reason, expected or None))
    return answers


def failure_of_answers(answers: Sequence[Answer], where: str = "") -> CheckError | None:
    """The error of the queries that failed, each with its answer; `where` says who was asked."""
    failed = [answer for answer in answers if not answer.ok]
    if not failed:
        return None
    return CheckError(
        f"{len(failed)} of {len(answers)} smoke queries failed{where}",
        hint="the model is exported all the same; look at its answers, or change smoke in the recipe",
        problems=[
            Problem(
                f"answered {reply.answer!r} ({reply.finish_reason}), expected {reply.expect or 'an answer'}",
                reply.prompt,
            )
            for reply in failed
        ],
    )


def _shown(reply: Reply) -> str:
    """The answer, with the calls that it makes as JSON."""
    calls = [json.dumps(call.get("function"), ensure_ascii=False) for call in reply.tool_calls]
    return "\n".join([reply.text, *calls] if reply.text.strip() or not calls else calls)


def _makes(call: Mapping[str, Any], expected: Call) -> bool:
    """Whether it is the call expected: the name, and arguments that are a JSON object, equal where named."""
    function = call.get("function")
    if not isinstance(function, Mapping) or function.get("name") != expected.name:
        return False
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return False
    return isinstance(arguments, Mapping) and expected.arguments in (None, arguments)


def _is_ok(reply: Reply, pattern: re.Pattern[str] | None, query: Query) -> bool:
    """Whether it makes the call expected, and holds the pattern."""
    if query.expect_call is not None:
        makes = any(_makes(call, query.expect_call) for call in reply.tool_calls)
        return makes and (pattern is None or pattern.search(reply.text) is not None)
    if pattern is None:
        return bool(reply.text.strip() or reply.tool_calls)
    return reply.finish_reason == "stop" and pattern.search(reply.text) is not None


def _compiled(queries: Sequence[Query]) -> list[re.Pattern[str] | None]:
    patterns: list[re.Pattern[str] | None] = []
    problems: list[Problem] = []
    for number, query in enumerate(queries):
        try:
            patterns.append(None if query.expect is None else re.compile(query.expect))
        except re.error as wrong:
            problems.append(
                Problem(
                    f"{query.expect!r} is no regular expression: {wrong}", field=f"smoke[{number}].expect"
                )
            )
    if problems:
        raise RecipeError("smoke patterns are regular expressions as of Python's re", problems=problems)
    return patterns
