"""The stage *smoke*: the recipe's queries, and the held-out rows, asked of the served model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from forge import report
from forge.chat import stops
from forge.codec import from_plain
from forge.errors import CheckError, ForgeError, Problem
from forge.pipeline.stage import Action, Result
from forge.resolve.queries import queries_in
from forge.resolve.stage import OfShip
from forge.serve.endpoint import Endpoint
from forge.serve.queries import Answer
from forge.stages.deploy import DEPLOY_STAGE, DeployFacts
from forge.stages.evaluate import EvaluateStage, evaluated, learned
from forge.store.artifacts import Facts
from forge.train.figures import Heldout, HeldoutAnswer, ServedAnswer

# The rest of `serve` is imported where it is used: it loads httpx, which a plan has no use for.


@dataclass(frozen=True)
class SmokeFacts:
    """The answers to the recipe's queries and to the held-out rows; `stops` says how replies end wrongly."""

    smoke: tuple[Answer, ...]
    stops: tuple[str, ...]
    heldout: Heldout | None = None


class SmokeAction(OfShip, Action):
    """The recipe's queries, and the held-out rows, asked of the served model.

    Failed queries do not raise here: the run is recorded first.
    """

    name = "smoke"
    needs = (DEPLOY_STAGE,)
    rank = 90

    def findings(self, results: Mapping[str, Result]) -> Mapping[str, object]:
        """What was learned, as the shipped file shows it."""
        heldout = results[self.name].read(SmokeFacts).heldout
        measured = evaluated(results[EvaluateStage.name]) if heldout else None
        return {"learned": learned(measured, heldout.exact)} if heldout and measured else {}

    def summary(self, result: Result, run: Path) -> Mapping[str, object]:
        return {
            "smoke": [
                {"prompt": answer.prompt, "answer": answer.answer, "ok": answer.ok}
                for answer in result.read(SmokeFacts).smoke
            ]
        }

    def verdict(self, facts: Facts) -> ForgeError | None:
        return failure_of_smoke(from_plain(SmokeFacts, facts))

    def act(self, results: Mapping[str, Result], stack: ExitStack) -> SmokeFacts:
        from forge.serve.smoke import run_smoke

        deployed = results[DEPLOY_STAGE].read(DeployFacts)
        endpoint = Endpoint(deployed.endpoint, deployed.model)
        answers = run_smoke(endpoint, queries_in(self.ship.recipe))
        for answer in answers:
            report.info(f"  {answer.prompt}\n    → {answer.answer}" + ("" if answer.ok else "   ✗"))
        measured = evaluated(results[EvaluateStage.name]) if EvaluateStage.name in results else None
        exact = measured.exact if measured else None
        heldout = _ask_heldout(endpoint, exact.answers) if exact else None
        replies = [(answer.answer, answer.finish_reason) for answer in answers]
        replies += [(row.served, row.finish_reason) for row in (heldout.answers if heldout else ())]
        broken = self.ship.stops.in_replies(replies, should_end=bool(exact and exact.after))
        return SmokeFacts(tuple(answers), tuple(problem.message for problem in broken), heldout)


def failure_of_smoke(facts: SmokeFacts) -> CheckError | None:
    """The error of what *smoke* found: replies that do not end as they should, and queries that failed."""
    from forge.serve.smoke import failure_of_answers

    broken = stops.failure_of_stops([Problem(message, stops.LIVE) for message in facts.stops])
    failed = failure_of_answers(facts.smoke)
    if broken and failed:
        broken.problems += failed.problems
    return broken or failed


def _ask_heldout(endpoint: Endpoint, rows: Sequence[HeldoutAnswer]) -> Heldout:
    """Held-out questions to the shipped file behind its server: how many answers are exact."""
    from forge.serve.client import Client
    from forge.serve.wire import Sampling

    asked: list[ServedAnswer] = []
    with Client(endpoint) as client:
        for number, row in enumerate(rows, 1):
            reply = client.chat(row.messages, Sampling(max_tokens=128, seed=0))
            asked.append(
                ServedAnswer(**vars(row), served=reply.text.strip(), finish_reason=reply.finish_reason)
            )
            report.advance("ask the held-out rows", number, len(rows))
    return Heldout(
        rows=len(asked),
        exact=sum(row.served == row.expected for row in asked),
        stopped=sum(row.finish_reason == "stop" for row in asked),
        answers=tuple(asked),
    )
