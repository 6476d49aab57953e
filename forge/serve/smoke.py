"""A few questions to a live server whose answers show that the model does what it was made for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from forge.errors import CheckError, Problem, RecipeError
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint, Message
from forge.serve.wire import Reply, Sampling


@dataclass(frozen=True)
class Query:
    """A conversation that ends with the user's turn, and the pattern its answer must hold."""

    messages: tuple[Message, ...]
    expect: str | None = None
    max_tokens: int = 256


@dataclass(frozen=True)
class Answer:
    """What came back. `prompt` is the user's last turn; `finish_reason` `length`: it was cut."""

    prompt: str
    answer: str
    ok: bool
    finish_reason: str
    expect: str | None


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
            reply = client.chat(query.messages, Sampling(max_tokens=query.max_tokens, seed=seed))
            prompt = next(turn["content"] for turn in reversed(query.messages) if turn["role"] == "user")
            ok = _is_ok(reply, pattern)
            answers.append(Answer(prompt, reply.text, ok, reply.finish_reason, query.expect))
    return answers


def failure_of(answers: Sequence[Answer], where: str = "") -> CheckError | None:
    """The error of the queries that failed, each with its answer; `where` says who was asked."""
    failed = [one for one in answers if not one.ok]
    if not failed:
        return None
    return CheckError(
        f"{len(failed)} of {len(answers)} smoke queries failed{where}",
        hint="the model is exported all the same; look at its answers, or change smoke in the recipe",
        problems=[
            Problem(
                f"answered {one.answer!r} ({one.finish_reason}), expected {one.expect or 'an answer'}",
                one.prompt,
            )
            for one in failed
        ],
    )


def _is_ok(reply: Reply, pattern: re.Pattern[str] | None) -> bool:
    if pattern is None:
        return bool(reply.text.strip())
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
