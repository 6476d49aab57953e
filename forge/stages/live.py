"""The stages that look at the world: *deploy* starts a server and proves its prompts, *smoke* asks it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from forge import report
from forge.chat import stops
from forge.chat.difference import first_difference
from forge.chat.hand_over import MODELFILE_JINJA, read_modelfile
from forge.chat.modelfile import Modelfile
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE
from forge.errors import CheckError, Problem
from forge.export.run import GGUF_FILE
from forge.pipeline.stage import Action, Result
from forge.recipe.schema import Recipe
from forge.serve.endpoint import Endpoint, Message
from forge.stages.artifacts import adapter_in
from forge.stages.modelfile_stage import context_tokens
from forge.stages.ship import Ship

if TYPE_CHECKING:
    from forge.serve.smoke import Query

# The rest of `serve` is imported where it is used: it loads httpx, which a plan has no use for.
EXPORT = "export"
_OWN_PROMPTS = 50
_ASKED = 8


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


class DeployAction(Action):
    """The recipe's runtime on the exported file; its prompts and ids are compared with training's."""

    name = "deploy"
    needs = (EXPORT,)

    def __init__(self, ship: Ship) -> None:
        self.ship = ship
        self.endpoint: Endpoint | None = None

    def act(self, results: Mapping[str, Result], stack: ExitStack) -> dict[str, Any]:
        from forge.serve.runtime import Settings
        from forge.serve.runtimes import runtime_for
        from forge.stages.live_proof import prove_live
        from forge.stages.ollama import prove_in_ollama

        deploy = self.ship.recipe.deploy
        artifact = results[EXPORT].artifact
        assert artifact is not None
        data = results["data"].facts if "data" in results else {}
        conversations = _conversations(self.ship.recipe, results)
        in_ollama = deploy.runtime == "ollama"
        settings = Settings(
            model=artifact.path / GGUF_FILE,
            adapter=adapter_in(artifact),
            alias=self.ship.recipe.name,
            context_tokens=context_tokens(self.ship, data),
            host=deploy.host,
            # What is kept is started once more when all is proved, where an earlier one may serve still;
            # Ollama's port is that of a server that is there already.
            port=0 if deploy.keep and not in_ollama else deploy.port,
            parallel=deploy.parallel,
            threads=deploy.threads,
            gpu_layers=deploy.gpu_layers,
            without_key=deploy.without_key,
            modelfile=_modelfile(results),
            proof=partial(prove_in_ollama, self.ship, conversations) if in_ollama else None,
        )
        endpoint = stack.enter_context(runtime_for(deploy.runtime)(settings, log=self.ship.log))
        live = None
        if not in_ollama:
            prove_prompts(self.ship, endpoint, conversations)
        if not in_ollama and "verify" in results:
            live = prove_live(
                endpoint,
                results["verify"].facts,
                conversations[1 : 1 + _ASKED],
                context_tokens=settings.context_tokens,
                longest_tokens=int(data.get("longest_tokens", 0)),
                is_adapted=artifact.facts["mode"] == "adapter",
            )
        return {
            "runtime": deploy.runtime,
            "endpoint": endpoint.url,
            "model": endpoint.model,
            "context_tokens": settings.context_tokens,
            "prompts_compared": len(conversations),
            "live": live,
        }


def _modelfile(results: Mapping[str, Result]) -> Modelfile | None:
    artifact = results["modelfile"].artifact if "modelfile" in results else None
    return read_modelfile(artifact.path / MODELFILE_JINJA, artifact.facts["left_out"]) if artifact else None


def _conversations(recipe: Recipe, results: Mapping[str, Result]) -> list[Sequence[Message]]:
    """Whose prompts are compared: a greeting, the smoke queries, the user's own rows."""
    asked = [query.messages for query in queries_in(recipe)]
    return [({"role": "user", "content": "Hello!"},), *asked, *_some_rows(results)]


def _some_rows(results: Mapping[str, Result]) -> list[Sequence[Message]]:
    """Prompts of the user's own held-out rows, else of training rows."""
    artifact = results["data"].artifact if "data" in results else None
    if artifact is None:
        return []
    name = HELDOUT_FILE if artifact.facts["heldout_rows"] else TRAIN_FILE
    with (artifact.path / name).open(encoding="utf-8") as stream:
        return [json.loads(line)["messages"][:-1] for line in islice(stream, _OWN_PROMPTS)]


def prove_prompts(ship: Ship, endpoint: Endpoint, conversations: Sequence[Sequence[Message]]) -> None:
    """The server writes each prompt as training did, in text and in ids.

    Where the GGUF adds BOS, llama-server takes it off the text and puts it back as a token. Raises
    `CheckError` with the first difference.
    """
    from forge.serve.client import Client

    form, bos = ship.prompt_format, ship.tokenizer.tokens.get("bos", "")
    with Client(endpoint) as client:
        for messages in conversations:
            expected = ship.template.render(messages, add_generation_prompt=True)
            found = client.apply_template(messages)
            if expected not in (found, bos + found):
                raise _differs("prompt differs from training's at character", expected, found)
            if (ids := client.tokenize(found, add_special=True)) != (trained := form.ids(expected)):
                raise _differs("token ids differ from training's at token", trained, ids)


def _differs(what: str, expected: Sequence[object], found: Sequence[object]) -> CheckError:
    same = first_difference(expected, found)
    start = max(0, same - 30)
    return CheckError(
        f"deploy: the server's {what} {same}",
        hint="pin the template's variables with train.template_variables, or use another base",
        problems=[
            Problem(repr(expected[start : same + 40]), "trained on"),
            Problem(repr(found[start : same + 40]), "served"),
        ],
    )


class SmokeAction(Action):
    """The recipe's queries, and the held-out rows, asked of the served model.

    Failed queries do not raise here: the run is recorded first.
    """

    name = "smoke"
    needs = ("deploy",)

    def __init__(self, ship: Ship) -> None:
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
