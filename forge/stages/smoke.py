"""The stage *smoke*: the recipe's queries, and the held-out rows, asked of the served model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from forge import report
from forge.chat import stops
from forge.errors import CheckError, Problem
from forge.pipeline.stage import Action, Result
from forge.recipe.schema import Recipe
from forge.resolve.resolved import Resolved
from forge.serve.endpoint import Endpoint

if TYPE_CHECKING:
    from forge.serve.smoke import Query

# The rest of `serve` is imported where it is used: it loads httpx, which a plan has no use for.


def queries_in(recipe: Recipe) -> list[Query]:
    """The recipe's smoke queries."""
    from forge.serve.smoke import Query

    queries = []
    for query in recipe.smoke:
        if query.messages is not None:
            messages = tuple({"role": turn.role, "content": turn.content} for turn in query.messages)
        else:
            system = ({"role": "system", "content": query.system},) if query.system else ()
            messages = (*system, {"role": "user", "content": query.prompt or ""})
        queries.append(Query(messages, query.expect, query.max_tokens))
    return queries


class SmokeAction(Action):
    """The recipe's queries, and the held-out rows, asked of the served model.

    Failed queries do not raise here: the run is recorded first.
    """

    name = "smoke"
    needs = ("deploy",)

    def __init__(self, ship: Resolved) -> None:
        self.ship = ship

    def act(self, results: Mapping[str, Result], stack: ExitStack) -> dict[str, Any]:
        from forge.serve.smoke import run_smoke

        deployed = results["deploy"].facts
        endpoint = Endpoint(deployed["endpoint"], deployed["model"])
        answers = run_smoke(endpoint, queries_in(self.ship.recipe))
        for answer in answers:
            report.info(f"  {answer.prompt}\n    → {answer.answer}" + ("" if answer.ok else "   ✗"))
        facts: dict[str, Any] = {"smoke": [asdict(answer) for answer in answers]}
        exact = results["evaluate"].facts.get("exact") if "evaluate" in results else None
        if exact:
            facts["heldout"] = _ask_heldout(endpoint, exact["answers"])
        replies = [(answer.answer, answer.finish_reason) for answer in answers]
        replies += [
            (row["served"], row["finish_reason"]) for row in facts.get("heldout", {}).get("answers", ())
        ]
        should_end = bool(exact and exact["after"])
        facts["stops"] = [one.message for one in self.ship.stops.in_replies(replies, should_end=should_end)]
        return facts


def failure_of(facts: Mapping[str, Any]) -> CheckError | None:
    """The error of what *smoke* found: replies that do not end as they should, and queries that failed."""
    from forge.serve.smoke import Answer
    from forge.serve.smoke import failure_of as failure_of_answers

    broken = stops.failure_of([Problem(message, stops.LIVE) for message in facts["stops"]])
    failed = failure_of_answers([Answer(**answer) for answer in facts["smoke"]])
    if broken and failed:
        broken.problems += failed.problems
    return broken or failed


def _ask_heldout(endpoint: Endpoint, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Held-out questions to the shipped file behind its server: how many answers are exact."""
    from forge.serve.client import Client
    from forge.serve.wire import Sampling

    asked: list[dict[str, Any]] = []
    with Client(endpoint) as client:
        for number, row in enumerate(rows, 1):
            reply = client.chat(row["messages"], Sampling(max_tokens=128, seed=0))
            asked.append({**row, "served": reply.text.strip(), "finish_reason": reply.finish_reason})
            report.advance("ask the held-out rows", number, len(rows))
    return {
        "rows": len(asked),
        "exact": sum(row["served"] == row["expected"] for row in asked),
        "stopped": sum(row["finish_reason"] == "stop" for row in asked),
        "answers": asked,
    }


def smoke_passes(recipe: Recipe, endpoint: Endpoint) -> None:
    """The run's smoke queries; raises `CheckError` when one fails."""
    from forge.serve.smoke import failure_of, run_smoke

    answers = run_smoke(endpoint, queries_in(recipe))
    if failure := failure_of(answers, " in Ollama"):
        raise failure
    if not answers:
        ask_anything(endpoint)


def ask_anything(endpoint: Endpoint) -> None:
    """Any answer shows that the server can load the model."""
    from forge.serve.client import Client
    from forge.serve.wire import Sampling

    with Client(endpoint) as client:
        client.chat([{"role": "user", "content": "Hello!"}], Sampling(max_tokens=16))
