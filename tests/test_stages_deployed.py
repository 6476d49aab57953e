"""What *deploy* proves of a server is proved: a real one on a real file, and a fault for each proof."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge import report
from forge.chat.stops import StopContract
from forge.chat.template import ChatTemplate
from forge.codec import to_plain
from forge.data.account import Prepared, Shown
from forge.data.prepare import HELDOUT_FILE
from forge.errors import CheckError, MissingToolError
from forge.export.run import GGUF_FILE
from forge.pipeline.stage import Result
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.serve.client import Client
from forge.serve.ollama import prove_kinds
from forge.serve.talk import OfKind, Talk
from forge.stages.deploy import DeployAction, DeployFacts
from forge.stages.smoke import SmokeAction
from forge.store.artifacts import Artifact, Store
from forge.tools.ollama import Ollama
from forge.train.figures import Exact, Heldout, HeldoutAnswer, ServedAnswer
from tests.conftest import copy_of_tiny
from tests.fake_ollama import FakeOllama
from tests.makers.tokenizer import CHATML
from tests.models import evaluated
from tests.stand_in_server import StandIn
from tests.test_stages_asking import EXPORT_FACTS
from tests.test_verify_maths import _measurement as measurement
from tests.tiny_gguf import END_OF_TURN, REPLY, SPECIAL, SPELLING, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]
# As `write_tiny_gguf` numbers them: what its model says first, and a character that it does not say.
CHARACTERS = [*SPECIAL, "\n", *(chr(code) for code in range(32, 127))]
DATA = Prepared(
    0, 0, 1, 1, 1, 1.0, 1, 1, 0, 0, (), {}, {}, {}, (), Shown("", "", ""), 0, 512, "<|im_end|>", 2
)  # fmt: skip
FIRST, ANOTHER = len(CHARACTERS), CHARACTERS.index("x")


def ship_of(directory: Path, deploy: str, expect: str = ".*", template: str = "") -> Resolved:
    """A ship of a base whose tokenizer is that of the file."""
    base = copy_of_tiny(directory / "base")
    described = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    for token in described["added_tokens"]:
        token["id"] = SPECIAL.index(token["content"])
    words = [word if index == 0 else f" {word}" for index, word in enumerate(REPLY.split(" "))]
    spelt = [*SPECIAL, *(text.translate(SPELLING) for text in [*CHARACTERS[len(SPECIAL) :], *words])]
    described["model"] |= {"vocab": {text: number for number, text in enumerate(spelt)}, "merges": []}
    (base / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": END_OF_TURN}))
    (directory / "recipe.yaml").write_text(
        f"name: mini\nbase: {json.dumps({'id': './base', 'chat_template': template or None})}\n"
        "data: {source: builtin:yoda}\n"
        f"deploy: {{{deploy}, context_tokens: 512}}\n"
        f"smoke: [{{prompt: Hello?, max_tokens: 16, expect: {expect}}}]\n"
    )
    store = Store(directory / "home")
    return resolve_recipe(load(directory / "recipe.yaml"), store, directory / "runs" / "mini", offline=True)


def measured(ship: Resolved, token: int) -> Mapping[str, Any]:
    """What *verify* would have kept of a file that answers `token` first, and hardly anything else."""
    prompt = ship.template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    expected = {"ids": ship.prompt_format.ids(prompt), "top": [[token, 0.0]], "shift": 0.0}
    whole = measurement()
    return {**whole, "live": [expected] * 4, "file": {**whole["file"], "type": "f16", "sampling": {}}}


def deployed(
    ship: Resolved,
    directory: Path,
    verify: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
) -> DeployFacts:
    exported = directory / "exported"
    exported.mkdir()
    ship.run_directory.mkdir(parents=True)
    (exported / HELDOUT_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tiny_gguf(exported / GGUF_FILE, template=ship.template.pinned_source() if rows else CHATML)
    artifact = Artifact("export", "key", "digest", exported, {**EXPORT_FACTS, "quant": "f16"})
    data = Artifact("data", "key", "digest", exported, to_plain(replace(DATA, heldout_rows=len(rows))))
    results = {"export": Result("export", False, 0.0, artifact.facts, artifact)}
    if rows:
        results["data"] = Result("data", False, 0.0, data.facts, data)
    if verify:
        results["verify"] = Result("verify", False, 0.0, verify)
    with ExitStack() as stack:
        return DeployAction(ship).act(results, stack)


def test_a_sound_server(tmp_path: Path) -> None:
    ship = ship_of(tmp_path, "runtime: embedded")
    turns = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": turns[:2]}, {"messages": turns}, {"messages": turns[1:2]}]
    facts = deployed(ship, tmp_path, measured(ship, FIRST), rows)
    assert facts.prompts_compared == 4  # a greeting, the smoke query, and the rows that have a prompt
    assert (facts.runtime, facts.model, facts.context_tokens) == ("embedded", "mini", 512)
    assert facts.live and facts.live.problems == () and facts.live.handover.prompts == 4
    assert facts.live.finish_reasons == {"stop": 3}
    assert DeployAction(ship).verdict(to_plain(facts)) is None


def test_a_server_of_another_file(tmp_path: Path) -> None:
    ship = ship_of(tmp_path, "runtime: embedded")
    facts = deployed(ship, tmp_path, measured(ship, ANOTHER))
    failure = DeployAction(ship).verdict(to_plain(facts))
    assert failure is not None and failure.code == 5
    assert "the server's probabilities are not the file's" in failure.message


def test_a_server_with_other_ids(tmp_path: Path) -> None:
    ship = ship_of(tmp_path, "runtime: embedded")
    ids = ship.prompt_format.ids
    ship.__dict__["prompt_format"] = SimpleNamespace(ids=lambda text: [*ids(text), ANOTHER])
    with pytest.raises(CheckError, match="deploy: the server's token ids differ from training's at token"):
        deployed(ship, tmp_path)


def test_into_ollama(tmp_path: Path, fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)
    facts = deployed(ship_of(tmp_path, "runtime: ollama"), tmp_path)
    assert (facts.prompts_compared, facts.live) == (2, None)
    assert list(fake_ollama.models) == ["mini:latest"]


def _other_stops(ship: Resolved) -> None:
    ship.__dict__["stops"] = StopContract(SPECIAL[1], {SPECIAL[1]: 1})


def _other_prompts(ship: Resolved) -> None:
    ship.__dict__["template"] = ChatTemplate(ship.template.source + "!", ship.template.special_tokens)


def _other_counts(ship: Resolved) -> None:
    form = ship.prompt_format
    ship.__dict__["prompt_format"] = SimpleNamespace(ids=lambda text: form.ids(text)[1:])


@pytest.mark.parametrize(
    ("change", "expect", "said"),
    [
        (_other_stops, ".*", "['<|im_end|>'] instead of ['<|im_start|>']"),
        (_other_prompts, ".*", "assistant\\n!"),
        (_other_counts, ".*", "24 tokens"),
        (lambda ship: None, "^never$", "expected ^never$"),
    ],
    ids=["stops", "prompts", "tokens", "smoke"],
)
def test_what_is_wrong_in_ollama_keeps_it_out(
    change: Any,
    expect: str,
    said: str,
    tmp_path: Path,
    fake_ollama: FakeOllama,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own import compares the file with itself; training's template, stops and ids are the stage's."""
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)
    ship = ship_of(tmp_path, "runtime: ollama", expect)
    change(ship)
    with pytest.raises(CheckError) as caught:
        deployed(ship, tmp_path)
    assert said in " ".join(map(str, caught.value.problems))
    assert not fake_ollama.models


CALLED = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky", "long": True}}}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
# Tools, calls and thinking, as short as they can be written.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ANSWER = {"role": "assistant", "content": "a"}
ROWS: tuple[Mapping[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "q"}, ANSWER], "tools": [TOOL]},
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [CALLED]},
            {"role": "tool", "content": "blue", "name": "look"},
            ANSWER,
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "b", "reasoning_content": "r"},
            {"role": "user", "content": "why"},
            ANSWER,
        ]
    },
)
KINDS = [("text", 2, 2, ""), ("tools", 1, 1, ""), ("tool calls", 1, 1, ""), ("thinking", 1, 1, "")]


def _kinds(facts: DeployFacts) -> list[tuple[str, int, int, str]]:
    return [(one.kind, one.prompts, one.same, one.why) for one in facts.prompts]


def test_prompts_with_tools_calls_and_thinking_are_compared_with_all_of_it(tmp_path: Path) -> None:
    ship = ship_of(tmp_path, "runtime: embedded", template=TOOLS)
    facts = deployed(ship, tmp_path, rows=ROWS)
    assert (_kinds(facts), facts.prompts_compared) == (KINDS, 5)


def test_a_server_that_is_not_told_the_tools_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Client.apply_template
    monkeypatch.setattr(Client, "apply_template", lambda self, messages, tools=(): told(self, messages))
    with pytest.raises(CheckError, match="the server's prompt differs from training's"):
        deployed(ship_of(tmp_path, "runtime: embedded", template=TOOLS), tmp_path, rows=ROWS[:1])


def test_ollamas_prompts_with_tools_calls_and_thinking(
    tmp_path: Path, fake_ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ollama makes of them is its own: it is said how far they are training's, and nothing fails."""
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)
    ship = ship_of(tmp_path, "runtime: ollama", template=TOOLS)
    fake_ollama.spoil = lambda text: text.replace('"look"', '"peek"')
    said = io.StringIO()
    with report.copied_to(said):
        facts = deployed(ship, tmp_path, rows=ROWS)
    assert list(fake_ollama.models) == ["mini:latest"]
    text, tools, calls, thinking = _kinds(facts)
    assert (text, thinking) == (KINDS[0], KINDS[3])
    assert (tools[2], calls[2], facts.prompts_compared) == (0, 0, 3)
    assert "Ollama writes" in tools[3] and "peek" in tools[3]
    assert f"warning: Ollama: prompts with tools: 0 of 1 are training's: {tools[3]}" in said.getvalue()
    assert "Ollama: prompts with thinking: 1 of 1 are training's" in said.getvalue()


@pytest.mark.parametrize("version", ["0.33.0", "0.29.0"])
def test_ollama_writes_them_where_it_renders_the_jinja(
    version: str, tmp_path: Path, fake_ollama: FakeOllama
) -> None:
    fake_ollama.version = version
    template = ChatTemplate(TOOLS)
    file = write_tiny_gguf(tmp_path / "m.gguf", template=template.pinned_source())
    talks = [Talk(row["messages"][:-1], row.get("tools", ())) for row in ROWS]
    with Ollama(fake_ollama.url) as server:
        fields = {"files": {"m.gguf": server.push(file, "m")}, "parameters": {"num_ctx": 4096}}
        server.create("m", fields | {"template": "{{ range .Messages }}{{ .Content }}{{ end }}"})
        found = prove_kinds(server, "m", template, talks)
    if version == "0.33.0":  # a TEMPLATE is ignored for such a file
        assert found == [OfKind(one.kind, 1, 1) for one in talks]
        return
    assert [(one.kind, one.prompts, one.same) for one in found] == [(one.kind, 1, 0) for one in talks]
    assert "the server writes none" in found[0].why and "does not support tools" in found[1].why
    assert "Ollama writes" in found[2].why  # what a TEMPLATE of texts leaves out


def test_an_ollama_that_does_not_answer_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError):
        DeployAction(ship_of(tmp_path, "runtime: ollama")).require_tools()


def test_the_smoke_queries_and_the_held_out_rows_are_asked_of_what_is_served(tmp_path: Path) -> None:
    ship = ship_of(tmp_path, "runtime: embedded")
    asked = [[{"role": "user", "content": text}] for text in ("say hi", "say no")]
    rows = [HeldoutAnswer(tuple(messages), "SAY HI", "", "SAY HI") for messages in asked]
    measured = evaluated(exact=Exact(2, 0, 1, tuple(rows)))
    with StandIn() as server, ExitStack() as stack:
        where = DeployFacts("embedded", server.endpoint.url, server.endpoint.model, 512, 1, None)
        results = {"deploy": Result("deploy", False, 0.0, to_plain(where))}
        results["evaluate"] = Result("evaluate", False, 0.0, to_plain(measured))
        facts = SmokeAction(ship).act(results, stack)
    answers = [
        ServedAnswer(**vars(row), served=row.messages[0]["content"].upper(), finish_reason="stop")
        for row in rows
    ]
    assert facts.heldout == Heldout(2, exact=1, stopped=2, answers=tuple(answers))
    assert [(one.prompt, one.answer.strip(), one.ok) for one in facts.smoke] == [("Hello?", "HELLO?", True)]
    assert facts.stops == () and SmokeAction(ship).verdict(to_plain(facts)) is None
    assert [body["max_tokens"] for body in server.asked] == [16, 128, 128]
