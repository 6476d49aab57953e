"""The recipe's smoke queries, for whoever asks them: a ship, `forge smoke`, `forge import`."""

from __future__ import annotations

from forge.recipe.schema import Recipe
from forge.serve.endpoint import Endpoint
from forge.serve.queries import Call, Query

# The rest of `serve` is imported where it is used: it loads httpx, which a plan has no use for.


def queries_in(recipe: Recipe) -> list[Query]:
    """The recipe's smoke queries."""
    queries = []
    for query in recipe.smoke:
        if query.messages is not None:
            messages = tuple({"role": turn.role, "content": turn.content} for turn in query.messages)
        else:
            system = ({"role": "system", "content": query.system},) if query.system else ()
            messages = (*system, {"role": "user", "content": query.prompt or ""})
        call = query.expect_call
        queries.append(
            Query(
                messages,
                query.expect,
                query.max_tokens,
                query.tools,
                Call(call.name, call.arguments) if call else None,
            )
        )
    return queries


def smoke_passes(recipe: Recipe, endpoint: Endpoint) -> None:
    """The run's smoke queries; raises `CheckError` when one fails."""
    from forge.serve.smoke import failure_of_answers, run_smoke

    answers = run_smoke(endpoint, queries_in(recipe))
    if failure := failure_of_answers(answers, " in Ollama"):
        raise failure
    if not answers:
        ask_anything(endpoint)


def ask_anything(endpoint: Endpoint) -> None:
    """Any answer shows that the server can load the model."""
    from forge.serve.client import Client
    from forge.serve.wire import Sampling

    with Client(endpoint) as client:
        client.chat([{"role": "user", "content": "Hello!"}], Sampling(max_tokens=16))
