"""`deploy.runtime: ollama`, whole ships: against the fake, and a live server where OLLAMA_HOST is set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from forge.chat.modelfile import parse_modelfile
from forge.ship.serving import PORT, Wish, settings
from forge.tools.ollama import Ollama, server_url
from tests.conftest import link_converters
from tests.fake_ollama import FakeOllama
from tests.fake_ollama_prompts import Model
from tests.shipping import STAGES, Answer, Workshop

pytestmark = [pytest.mark.training, pytest.mark.network, pytest.mark.programs]


@dataclass(frozen=True)
class Shipped:
    """The first ship: where it was, what it said, and what a server that was empty then held."""

    place: Workshop
    answer: Answer
    models: Mapping[str, Model]


@pytest.fixture(scope="module")
def shipped(ship_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    place = Workshop(tmp_path_factory.mktemp("shipped"), ship_store)
    place.recipe(deploy={"runtime": "ollama"})
    with FakeOllama() as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OLLAMA_HOST", server.url)
        return Shipped(place, place.ship(), dict(server.models))


@pytest.fixture
def place(shipped: Shipped) -> Workshop:
    """Where the first ship was; what it made is read, not changed."""
    return shipped.place


@pytest.fixture
def again(shipped: Shipped, workshop: Workshop) -> Workshop:
    """The same recipe in a directory of the test's own: all is made but what Ollama sees."""
    workshop.recipe(deploy={"runtime": "ollama"})
    return workshop


@pytest.fixture
def fake(fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> FakeOllama:
    """An empty server, which forge finds."""
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)
    return fake_ollama


def test_a_ship_into_ollama(shipped: Shipped) -> None:
    """Q2, Q3, P4, pitfalls 49, 54: trained, exported, imported, prompts and tokens compared, asked."""
    place, answer = shipped.place, shipped.answer
    assert list(answer.cached) == list(STAGES)
    assert answer.fields["smoke"][0]["answer"]
    facts = place.manifest()["facts"]
    assert (facts["deploy"]["runtime"], facts["deploy"]["model"]) == ("ollama", "mini")
    assert facts["deploy"]["prompts_compared"] >= 5
    assert facts["smoke"]["stops"] == []
    written = parse_modelfile((place.run / "Modelfile.jinja").read_text(encoding="utf-8"))
    assert shipped.models["mini:latest"].parameters == {
        **written.parameters, "stop": list(written.stops)
    }  # fmt: skip
    assert set(shipped.models) == {"mini:latest"}


def test_the_run_says_that_200_conversations_give_the_same_bytes(place: Workshop) -> None:
    """Through training tokenizer, the GGUF's Jinja, the Modelfile's TEMPLATE; in manifest and report."""
    same = place.manifest()["facts"]["modelfile"]["same_prompts"]
    assert same == {
        "conversations": 200,
        "through": ["the training tokenizer", "the GGUF's Jinja", "the Modelfile's TEMPLATE"],
    }
    page = (place.run / "report.html").read_text(encoding="utf-8")
    assert "the same bytes for 200 conversations through the training tokenizer" in page
    assert "not claimed: tools, thinking" in page


def test_the_same_gguf_under_another_name(place: Workshop, fake: FakeOllama) -> None:
    """`forge import RUN`: the run's own stops, and its smoke queries asked."""
    answer = place.forge("import", "mini", "--name", "yoda")
    assert answer.code == 0, answer.said
    assert answer.fields["name"] == "yoda" and answer.fields["prompt_checked"] > 40
    assert set(fake.models) == {"yoda:latest"}
    file = place.forge("import", str(place.run / "mini-q4_k_m.gguf"), "--name", "yoda")
    assert file.fields["digest"] == answer.fields["digest"]


def test_forge_serve_hands_over_what_the_run_says(place: Workshop) -> None:
    """Stops and sampling from the run's Modelfile; the server of OLLAMA_HOST, not `forge serve`'s port."""
    chosen = settings(Wish(str(place.run), runtime="ollama", port=None))
    assert (chosen.port, chosen.modelfile) == (
        0,
        parse_modelfile((place.run / "Modelfile.jinja").read_text()),
    )
    assert settings(Wish(str(place.run), runtime="ollama", port=PORT)).port == PORT
    assert settings(Wish(str(place.run), port=None)).port == PORT


def test_a_server_that_prompts_otherwise_fails_the_ship(again: Workshop, fake: FakeOllama) -> None:
    fake.spoil = lambda prompt: prompt.replace("<|im_end|>\n", "<|im_end|>")
    answer = again.ship(code=5)
    assert answer.fields["error"]["message"].startswith("Ollama's prompts are not those")
    assert fake.models == {}


def test_the_name_is_as_it_was_until_all_is_proved(again: Workshop, fake: FakeOllama) -> None:
    """Token counts, and smoke queries, come before the name changes."""
    again.ship()
    before = vars(fake.models["mini:latest"])
    fake.counts_more = 1
    error = again.ship(code=5).fields["error"]
    assert "tokens" in error["problems"][0]["message"], error
    fake.counts_more = 0
    again.recipe(
        deploy={"runtime": "ollama", "context_tokens": 512},
        smoke=[{"prompt": "Hello there.", "expect": "^never said$"}],
    )
    error = again.ship(code=5).fields["error"]
    assert error["message"] == "1 of 1 smoke queries failed in Ollama"
    assert set(fake.models) == {"mini:latest"} and vars(fake.models["mini:latest"]) == before


def test_without_a_server_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    place = Workshop(tmp_path, link_converters(tmp_path / "home"))
    place.recipe(deploy={"runtime": "ollama"})
    answer = place.ship(code=3)
    assert "no Ollama server answers" in answer.fields["error"]["message"]
    assert "ollama serve" in answer.fields["error"]["hint"]
    assert place.stage_directories("train") == []


@pytest.mark.parametrize("named", [True, False])
def test_a_ship_into_the_server_that_its_recipe_names(
    place: Workshop, fake: FakeOllama, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Looked for, proved and kept there, wherever OLLAMA_HOST is; at OLLAMA_HOST where it names none."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9" if named else fake.url)
    address = {"host": "localhost", "port": fake.port} if named else {}
    place.recipe(deploy={"runtime": "ollama", **address, "keep": True})
    url = f"http://localhost:{fake.port}" if named else fake.url
    try:
        assert place.ship().fields["endpoint"] == url
        assert place.manifest()["facts"]["deploy"]["endpoint"] == url
    finally:
        assert place.forge("stop").fields == {"stopped": ["mini"]}
        place.recipe(deploy={"runtime": "ollama"})


@pytest.mark.ollama
def test_a_ship_into_a_live_ollama(workshop: Workshop) -> None:
    if not os.environ.get("OLLAMA_HOST"):
        pytest.skip("OLLAMA_HOST is not set: there is no live server")
    workshop.recipe(name="forge-test-ship", deploy={"runtime": "ollama"})
    try:
        assert workshop.ship().fields["smoke"][0]["answer"]
    finally:
        with Ollama(server_url()) as server:
            server.delete("forge-test-ship")


@pytest.mark.slow
def test_real_transformers_and_the_runs_files_agree(place: Workshop) -> None:
    """The training tokenizer as transformers loads it, beside what the run left: 200 conversations."""
    from transformers import AutoTokenizer

    from forge.chat import go_interpreter, probe
    from forge.chat.same_prompts import CONVERSATIONS, as_served
    from forge.chat.template import ChatTemplate
    from forge.model.gguf_header import read_gguf

    tokenizer = AutoTokenizer.from_pretrained(place.run / "adapter")
    template = ChatTemplate(tokenizer.chat_template)
    carried = read_gguf(place.run / "mini-q4_k_m.gguf").chat_template
    assert carried is not None
    served = as_served(carried, template)
    modelfile = parse_modelfile((place.run / "Modelfile").read_text(encoding="utf-8"))
    assert modelfile.template is not None
    go = go_interpreter.parse_go(modelfile.template)
    every = list(probe.conversations(probe.literals(template), has_system=True))[:CONVERSATIONS]
    assert len(every) == CONVERSATIONS
    for one in every:
        messages = [dict(message) for message in one]
        trained = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert served.render(one, add_generation_prompt=True) == trained
        assert go.render(one) == trained
