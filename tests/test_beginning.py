"""`model` of a recipe: what stands in front of every conversation, and how tokens are drawn, everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from forge.chat.beginning import refuse_unwritten, with_beginning
from forge.chat.hand_over import (
    MODELFILE,
    MODELFILE_JINJA,
    hand_over,
    read_modelfile,
    sampling_of,
    without_unwritable,
)
from forge.chat.same_prompts import compare_prompts
from forge.chat.stops import StopContract
from forge.chat.template import ChatTemplate
from forge.errors import CheckError, RecipeError
from forge.export.describe import describe
from forge.export.run import GGUF_FILE
from forge.model.base import BUILTIN
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.serve.ollama import import_model
from forge.stages.export import EXPORT_STAGE
from forge.stages.modelfile import ModelfileStage
from forge.store.artifacts import Artifact, Store
from forge.tools.ollama import Ollama
from tests.fake_ollama import FakeOllama
from tests.families import FAMILIES
from tests.makers.tokenizer import CHATML
from tests.test_stages_asking import EXPORT_FACTS
from tests.tiny_gguf import END_OF_TURN, SPECIAL, write_tiny_gguf

SYSTEM = 'You are "Yoda".\nSpeak so.'
EXAMPLES = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hmm. {{ x }} %}"})
QUESTION = {"role": "user", "content": "What is it?"}
RECIPE: Mapping[str, Any] = {
    "name": "mini",
    "base": "builtin:tiny",
    "data": {"source": "builtin:yoda", "columns": {"prompt": "sentence", "completion": "translation_extra"}},
}


def resolved(place: Path, **model: Any) -> Resolved:
    loaded = load(place / "recipe.yaml", text=json.dumps({**RECIPE, "model": model}))
    return resolve_recipe(loaded, Store(place / "home"), place / "runs" / "mini", offline=True)


def render(template: ChatTemplate, *messages: Mapping[str, str]) -> str:
    return template.render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["llama-3", "llama-2", "mistral", "phi-3", "qwen3", "chatml", "alpaca"])
def test_a_template_writes_its_beginning_as_it_writes_the_same_turns(name: str) -> None:
    plain = FAMILIES[name].template()
    begun = ChatTemplate(with_beginning(plain.source, SYSTEM, EXAMPLES), plain.special_tokens)
    system, own = {"role": "system", "content": SYSTEM}, {"role": "system", "content": "Another."}
    assert render(begun, QUESTION) == render(plain, system, *EXAMPLES, QUESTION)
    assert render(begun, own, QUESTION) == render(plain, own, *EXAMPLES, QUESTION)
    handed = hand_over(begun, add_bos=False, stops=["x"], context_tokens=64, system=SYSTEM)
    go = handed.modelfile("go", "model.gguf")
    assert handed.compiled.go, handed.compiled.reason
    assert compare_prompts(handed, begun.pinned_source(), go).conversations == 200
    assert go.system == SYSTEM and go.messages == (), "the template writes the examples: no MESSAGE, or twice"


def test_one_that_begins_so_is_left_as_it_is() -> None:
    begun = with_beginning(CHATML, SYSTEM, EXAMPLES)
    assert with_beginning(begun, SYSTEM, EXAMPLES) == begun
    assert with_beginning(CHATML, None, ()) == CHATML


@pytest.mark.parametrize(
    ("source", "system", "messages", "message"),
    [
        (
            "{{ raise_exception('no system here') }}",
            SYSTEM,
            (),
            r"^model\.system: .* refuses it: .*no system",
        ),
        ("{{ raise_exception('one turn') }}", None, EXAMPLES, r"^model\.messages: .* refuses it"),
        ("{{ messages[-1].content }}", SYSTEM, (), r"^model\.system: .* does not write it: 'You are"),
        ("{{ messages[0].content }}", SYSTEM, EXAMPLES, r"^model\.messages: .* does not write it: 'Hi\."),
    ],
)
def test_a_template_that_does_not_write_it_is_refused(
    source: str, system: str | None, messages: Sequence[Mapping[str, str]], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        refuse_unwritten(ChatTemplate(with_beginning(source, system, messages)), system, messages)


def test_a_recipe_trains_and_serves_with_it(tmp_path: Path) -> None:
    ship = resolved(tmp_path, system=f"{SYSTEM}\n\n", messages=list(EXAMPLES))
    expected = resolved(tmp_path).template.render(
        [{"role": "system", "content": SYSTEM}, *EXAMPLES, QUESTION], add_generation_prompt=True
    )
    assert render(ship.template, QUESTION) == expected
    assert (
        ChatTemplate(ship.template.pinned_source()).render([QUESTION], add_generation_prompt=True) == expected
    )
    assert ship.tokenizer_digest != resolved(tmp_path).tokenizer_digest
    (tmp_path / "no.jinja").write_text("{{ messages[-1].content }}<|im_end|>")
    text = json.dumps({**RECIPE, "base": {"id": "builtin:tiny", "chat_template": "no.jinja"}})
    loaded = load(tmp_path / "recipe.yaml", ["model.system=Hi"], text=text)
    with pytest.raises(RecipeError, match="does not write it"):
        resolve_recipe(loaded, Store(tmp_path / "home"), tmp_path / "runs" / "mini", offline=True)


SAMPLING = {"temperature": 0.3, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05}
IN_GGUF = {"temp": 0.3, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "penalty_repeat": 1.05}


def modelfiles(place: Path, written: Mapping[str, float]) -> Path:
    """What the stage makes of a GGUF that says `written` of sampling."""
    ship = resolved(place, system=SYSTEM, sampling=SAMPLING)
    exported, out = place / "exported", place / "out"
    for directory in (exported, out):
        directory.mkdir()
    template = ship.template.pinned_source()
    ship.__dict__["stops"] = StopContract(SPECIAL[END_OF_TURN], {SPECIAL[END_OF_TURN]: END_OF_TURN})
    write_tiny_gguf(exported / GGUF_FILE, template=template, sampling=written)
    made = Artifact(EXPORT_STAGE, "key", "digest", exported, {**EXPORT_FACTS, "quant": "f16"})
    ModelfileStage(ship).build({EXPORT_STAGE: made}, out)
    return out


def test_modelfiles_say_it(tmp_path: Path) -> None:
    out = modelfiles(tmp_path, IN_GGUF)
    for name in (MODELFILE, MODELFILE_JINJA):
        read = read_modelfile(out / name)
        assert read.system == SYSTEM
        others = {key: value for key, value in read.parameters.items() if key not in ("stop", "num_ctx")}
        assert others == {
            "temperature": 0.3, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "repeat_penalty": 1.05
        }  # fmt: skip


@pytest.mark.parametrize("other", [{**IN_GGUF, "temp": 0.8}, {"temp": 0.3}])
def test_a_gguf_that_servers_would_sample_otherwise_from_is_refused(
    other: Mapping[str, float], tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match="does not carry the sampling that was asked for") as caught:
        modelfiles(tmp_path, other)
    assert caught.value.problems[0].field.startswith("model.sampling.")


@pytest.mark.parametrize(
    ("stated", "asked", "samples", "told"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_k": 5}, {"temperature": 0.3}, True, {"top_k": 5}),
        ({"temperature": 0.6}, {"temperature": 0.3}, True, {}),
        ({"eos_token_id": 2}, {"temperature": 0}, False, {}),
    ],
)
def test_it_stands_over_what_the_base_says(
    stated: Mapping[str, Any],
    asked: Mapping[str, float],
    samples: bool,
    told: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    for directory in (base, out):
        directory.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((BUILTIN / "tiny" / name).read_bytes())
    (base / "generation_config.json").write_text(json.dumps(stated))
    describe(base, base, None, out, sampling=asked)
    assert json.loads((out / "generation_config.json").read_text()) == {
        **stated,
        **asked,
        "do_sample": samples,
    }
    assert sampling_of(base, asked) == {**told, **asked}


def test_a_system_prompt_that_no_modelfile_can_hold_is_the_templates_alone() -> None:
    hidden = 'a\u200bb """\n"""'
    template = ChatTemplate(with_beginning(CHATML, hidden, ()))
    handed, left = without_unwritable(
        hand_over(template, add_bos=False, stops=["x"], context_tokens=64, system=hidden)
    )
    assert not left and handed.modelfile("jinja", "model.gguf").system is None
    assert hidden in render(template, QUESTION)


@pytest.mark.network
@pytest.mark.programs
def test_ollama_is_told_and_its_prompts_are_proved(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    template = ChatTemplate(with_beginning(CHATML, SYSTEM, EXAMPLES))
    gguf = write_tiny_gguf(tmp_path / "model.gguf", template=template.pinned_source())
    handed = hand_over(
        template, add_bos=False, stops=["<|im_end|>"], context_tokens=512, system=SYSTEM,
        sampling={"temperature": 0.3},
    )  # fmt: skip
    with Ollama(fake_ollama.url) as server:
        assert import_model(server, "yoda", gguf, handed).prompts > 5
        asked = server.prompt("yoda", [QUESTION])
    made = fake_ollama.models["yoda:latest"]
    assert made.system == SYSTEM and made.parameters["temperature"] == 0.3
    assert asked == render(template, QUESTION)


def test_the_base_was_called_model_before() -> None:
    text = json.dumps({**RECIPE, "base": None, "model": "builtin:tiny"}).replace('"base": null, ', "")
    loaded = load(Path("recipe.yaml"), text=text)
    assert loaded.recipe.base.id == "builtin:tiny" and "model is now base" in loaded.warnings[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"messages": [EXAMPLES[0]]}, "messages must end with the assistant's turn"),
        ({"messages": [EXAMPLES[1]]}, "messages must be user and assistant in turn"),
        ({"messages": [{"role": "system", "content": "x"}]}, "a system prompt goes into system"),
        ({"system": " "}, "must not be empty"),
        ({"sampling": {"temperature": -1}}, "must be at least 0"),
        ({"sampling": {"temprature": 1}}, "did you mean temperature?"),
        ({"system": "x", "sistem": "y"}, "did you mean system?"),
    ],
)
def test_what_is_wrong_is_said(model: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(Path("recipe.yaml"), text=json.dumps({**RECIPE, "model": model}))
    assert [message in str(problem) for problem in caught.value.problems] == [True]
