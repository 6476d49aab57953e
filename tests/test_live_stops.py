"""A server that ends replies elsewhere, the real llama-server: the ship's live leg fails and says where."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from forge.codec import to_plain
from forge.errors import CheckError, Problem
from forge.pipeline.stage import Result
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.serve.embedded import serve_embedded
from forge.serve.runtime import ServerSettings
from forge.stages.deploy import DeployFacts
from forge.stages.smoke import SmokeAction, failure_of_smoke
from forge.store.artifacts import Store
from forge.train.figures import Exact, HeldoutAnswer
from tests.conftest import copy_of_tiny
from tests.makers.tokenizer import CHATML
from tests.models import evaluated as measured
from tests.tiny_gguf import END_OF_TURN, REPLY, SPECIAL, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]
END = "<|finis|>"  # llama.cpp ends a reply at <|im_end|> whatever the header says: it knows that name
ANOTHER = 20
RECIPE = (
    "name: mini\nbase: ./base\ndata: {source: builtin:yoda}\nsmoke: [{prompt: Hello?, max_tokens: 48%s}]\n"
)


def ship_of(directory: Path, expect: str = "") -> Resolved:
    """A ship of a base whose turns end with a token of another name."""
    base = copy_of_tiny(directory / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (base / name).read_text(encoding="utf-8")
        (base / name).write_text(text.replace(SPECIAL[END_OF_TURN], END), encoding="utf-8")
    (directory / "recipe.yaml").write_text(RECIPE % expect)
    store = Store(directory / "home")
    return resolve_recipe(load(directory / "recipe.yaml"), store, directory / "runs" / "mini", offline=True)


def ask(ship: Resolved, directory: Path, ends_at: int) -> CheckError | None:
    """The stage *smoke* of a model that answered one held-out row right when it was evaluated."""
    template = CHATML.replace(SPECIAL[END_OF_TURN], END)
    gguf = write_tiny_gguf(directory / "m.gguf", template=template, end=END, ends_at=ends_at)
    row = HeldoutAnswer(({"role": "user", "content": "Hello there?"},), REPLY, "", REPLY)
    with ExitStack() as stack:
        endpoint = stack.enter_context(
            serve_embedded(ServerSettings(gguf, "mini", 512, parallel=1, threads=1))
        )
        facts = DeployFacts("embedded", endpoint.url, endpoint.model, 512, 1, None)
        deployed = Result("deploy", False, 0.0, to_plain(facts))
        evaluated = Result("evaluate", False, 0.0, to_plain(measured(exact=Exact(1, 0, 1, (row,)))))
        asked = SmokeAction(ship).act({"deploy": deployed, "evaluate": evaluated}, stack)
    return failure_of_smoke(asked)


def test_a_reply_that_ends_where_it_should(tmp_path: Path) -> None:
    assert ask(ship_of(tmp_path), tmp_path, END_OF_TURN) is None


def test_a_stop_that_is_another_token_fails_the_ship(tmp_path: Path) -> None:
    """Silent wrong 4: the file's eos and eot are of another token, and no reply ends by itself."""
    failure = ask(ship_of(tmp_path, ", expect: ^In"), tmp_path, ANOTHER)
    assert failure is not None and failure.code == 5
    assert failure.message == "what ends a reply is not the same everywhere: broken at the live reply"
    stop, query = failure.problems
    # Its place once, and not in the message too.
    assert stop == Problem("no reply ends by itself; the tuned model's did", "the live reply")
    assert query.field == "Hello?" and query.message.endswith("(length), expected ^In")


def test_a_query_that_fails_is_told_with_its_answer(tmp_path: Path) -> None:
    failure = ask(ship_of(tmp_path, ", expect: ^never$"), tmp_path, END_OF_TURN)
    assert failure is not None and failure.message == "1 of 1 smoke queries failed"
    assert failure.problems == (Problem(f"answered {REPLY!r} (stop), expected ^never$", "Hello?"),)
