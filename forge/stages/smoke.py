"""The stage *smoke*: the recipe's queries, and the held-out rows, asked of the served model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forge import report
from forge.chat import stops
from forge.errors import CheckError, ForgeError, Problem
from forge.pipeline.stage import Action, Result
from forge.resolve.queries import queries_in
from forge.resolve.stage import OfShip
from forge.serve.endpoint import Endpoint
from forge.stages.deploy import DEPLOY_STAGE
from forge.stages.evaluate import EvaluateStage, learned
from forge.store.artifacts import Facts

# The rest of `serve` is imported where it is used: it loads httpx, which a plan has no use for.


class SmokeAction(OfShip, Action):
    """The recipe's queries, and the held-out rows, asked of the served model.

    Failed queries do not raise here: the run is recorded first.
    """

    name = "smoke"
    needs = (DEPLOY_STAGE,)
    rank = 90

    def findings(self, results: Mapping[str, Result]) -> Mapping[str, object]:
        """What was learned, as the shipped file shows it."""
        served = results[self.name].facts.get("heldout")
        return {"learned": learned(results[EvaluateStage.name].facts, served)} if served else {}

    def summary(self, result: Result, run: Path) -> Mapping[str, object]:
        return {
            "smoke": [{key: one[key] for key in ("prompt", "answer", "ok")} for one in result.facts["smoke"]]
        }

    def verdict(self, facts: Facts) -> ForgeError | None:
        return failure_of(facts)

    def act(self, results: Mapping[str, Result], stack: ExitStack) -> dict[str, Any]:
        from forge.serve.smoke import run_smoke

        deployed = results[DEPLOY_STAGE].facts
        endpoint = Endpoint(deployed["endpoint"], deployed["model"])
        answers = run_smoke(endpoint, queries_in(self.ship.recipe))
        for answer in answers:
            report.info(f"  {answer.prompt}\n    → {answer.answer}" + ("" if answer.ok else "   ✗"))
        facts: dict[str, Any] = {"smoke": [asdict(answer) for answer in answers]}
        exact = results[EvaluateStage.name].facts.get("exact") if EvaluateStage.name in results else None
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
