"""What was measured on a live Ollama 0.33 of its answers, one test a statement; the same for a live server.

The fake is held to them always, a live server where OLLAMA_HOST is set. PyPI's `ollama` is the
independent client. Models are made under names of the tests' own and deleted again. `test_fake_ollama_create`
has what goes before an answer.
"""

# ruff: noqa: E501 - one statement a test
from __future__ import annotations

import re
from pathlib import Path

import httpx
import ollama
import pytest

from forge.chat.modelfile import parse_modelfile
from forge.chat.template import ChatTemplate
from forge.tools.ollama import Ollama, stops_in
from tests import real_go
from tests.fake_ollama import FakeOllama
from tests.makers.tokenizer import CHATML
from tests.ollama_servers import make
from tests.tiny_gguf import END_OF_TEXT, REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]
USER = [{"role": "user", "content": "Hello?"}]
GO = '{{- range .Messages }}{{ "[" }}{{ .Role }}{{ "]" }}{{ .Content }}{{ end }}{{ "<|im_start|>assistant\\n" }}'
RENAMED = CHATML.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|end|>")


def test_parameters_are_looked_at_only_when_a_model_answers(
    ollama_client: Ollama, model_name: str, tiny_gguf: Path
) -> None:
    make(ollama_client, model_name, tiny_gguf, parameters={"temperature": "warm", "num_ctx": 512})
    with pytest.raises(Exception, match='option "temperature" must be of type float32') as caught:
        ollama_client.chat(model_name, USER)
    assert "(500)" in str(caught.value)


def test_the_independent_client(ollama_url: str, model_name: str, tiny_gguf: Path) -> None:
    """PyPI's ollama: blobs in chunks, create, show, list, chat, copy, delete."""
    client = ollama.Client(ollama_url, trust_env=False)
    digest = client.create_blob(tiny_gguf)
    told = client.create(
        model_name,
        files={tiny_gguf.name: digest},
        template=GO,
        parameters={"num_ctx": 512, "stop": ["<|im_end|>"]},
    )
    assert told.status == "success"
    assert client.show(model_name).template == GO
    assert f"{model_name}:latest" in [one.model for one in client.list().models]
    answer = client.chat(model_name, USER, options={"temperature": 0})
    assert (answer.message.content, answer.done_reason) == (REPLY, "stop")
    with pytest.raises(ollama.ResponseError, match="not found") as caught:
        client.chat("forge-test-nobody", USER)
    assert caught.value.status_code == 404
    client.copy(model_name, f"{model_name}-2")
    client.delete(f"{model_name}-2")
    assert f"{model_name}-2:latest" not in [one.model for one in client.list().models]


def test_stops_accumulate_and_are_shown(ollama_client: Ollama, model_name: str, tiny_gguf: Path) -> None:
    make(
        ollama_client,
        model_name,
        tiny_gguf,
        template=GO,
        parameters={"stop": ["<|im_end|>", 'say "x"', "\n"], "num_ctx": 512},
    )
    assert stops_in(ollama_client.show(model_name)) == {"<|im_end|>", 'say "x"', "\n"}


def test_it_shows_a_modelfile_with_its_blobs(ollama_client: Ollama, model_name: str, tiny_gguf: Path) -> None:
    """By their paths in its store, which are named by their digests."""
    fields = {
        "template": GO, "system": 'Say "aye".\nTwice.', "parameters": {"stop": ["<|im_end|>"], "num_ctx": 512},
        "messages": [{"role": "user", "content": "Hello"}],
    }  # fmt: skip
    make(ollama_client, model_name, tiny_gguf, **fields)
    shown = parse_modelfile(ollama_client.show(model_name)["modelfile"])
    assert re.fullmatch(r".*/sha256-[0-9a-f]{64}", shown.base)
    assert (shown.template, shown.system, shown.messages) == (GO, fields["system"], (("user", "Hello"),))
    assert shown.parameters == {"stop": ("<|im_end|>",), "num_ctx": 512} and shown.renderer is None


def test_keep_alive_0_unloads(
    ollama_url: str, ollama_client: Ollama, model_name: str, tiny_gguf: Path
) -> None:
    """As PyPI's ollama lists it."""
    client = ollama.Client(ollama_url, trust_env=False)
    make(ollama_client, model_name, tiny_gguf, template=GO, parameters={"num_ctx": 512})
    ollama_client.chat(model_name, USER, options={"num_predict": 1})
    assert f"{model_name}:latest" in [one.model for one in client.ps().models]
    ollama_client.unload(model_name)  # which waits until it is gone
    assert f"{model_name}:latest" not in [one.model for one in client.ps().models]


def test_it_shows_its_prompt(ollama_client: Ollama, model_name: str, tiny_gguf: Path) -> None:
    """`_debug_render_only`; neighbours of one role are merged."""
    make(ollama_client, model_name, tiny_gguf, template=GO, parameters={"num_ctx": 512})
    messages = [*USER, {"role": "user", "content": "{{ x }}"}, {"role": "assistant", "content": "a"}, *USER]
    shown = ollama_client.prompt(model_name, messages)
    assert shown == "[user]Hello?\n\n{{ x }}[assistant]a[user]Hello?<|im_start|>assistant\n"


def test_tools_and_thinking_need_a_template_that_has_them(
    ollama_url: str, ollama_client: Ollama, model_name: str, tiny_gguf: Path
) -> None:
    make(ollama_client, model_name, tiny_gguf, template=GO, parameters={"num_ctx": 512})
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
    }
    for more in ({"tools": [tool]}, {"think": True}):
        body = {"model": model_name, "messages": USER, "stream": False, **more}
        answer = httpx.post(f"{ollama_url}/api/chat", json=body, trust_env=False, timeout=60)
        assert (answer.status_code, "does not support" in answer.json()["error"]) == (400, True)


def test_a_jinja_near_to_a_known_one_is_taken_for_it(
    ollama_client: Ollama, model_name: str, tmp_path: Path
) -> None:
    """ChatML with renamed tokens is prompted with <|im_start|>, in silence; its stops come with it."""
    path = write_tiny_gguf(tmp_path / "m.gguf", template=RENAMED)
    make(ollama_client, model_name, path, parameters={"num_ctx": 512})
    assert ollama_client.prompt(model_name, USER).startswith("<|im_start|>user\n")
    assert "<|im_end|>" in stops_in(ollama_client.show(model_name))


def test_forges_remark_keeps_the_guess_off(ollama_client: Ollama, model_name: str, tmp_path: Path) -> None:
    pinned = ChatTemplate(RENAMED).pinned_source()
    path = write_tiny_gguf(tmp_path / "m.gguf", template=pinned)
    make(ollama_client, model_name, path, parameters={"num_ctx": 512, "stop": ["<|end|>"]})
    expected = ChatTemplate(RENAMED).render(USER, add_generation_prompt=True)
    assert ollama_client.prompt(model_name, USER) == expected
    assert stops_in(ollama_client.show(model_name)) == {"<|end|>"}


def test_without_a_template_it_falls_back_to_chatml(
    ollama_client: Ollama, model_name: str, tmp_path: Path
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", template=None)
    make(ollama_client, model_name, path, parameters={"num_ctx": 512})
    assert ollama_client.prompt(model_name, USER) == ChatTemplate(CHATML).render(
        USER, add_generation_prompt=True
    )


def test_the_server_switches_thinking_on(ollama_client: Ollama, model_name: str, tmp_path: Path) -> None:
    """transformers leaves it undefined (silent wrong 17)."""
    thinking = (
        CHATML
        + "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
        + "{# "
        + "x " * 200
        + "#}"
    )
    make(
        ollama_client,
        model_name,
        write_tiny_gguf(tmp_path / "m.gguf", template=thinking),
        parameters={"num_ctx": 512},
    )
    assert ollama_client.prompt(model_name, USER).endswith("<think>")


def test_a_template_that_writes_bos_makes_two(ollama_client: Ollama, model_name: str, tmp_path: Path) -> None:
    """The GGUF adds one: 17 tokens for 16 (silent wrong 3, pitfall 48)."""
    path = write_tiny_gguf(tmp_path / "m.gguf", adds_bos=True)
    counted = {}
    for bos in ("", "<|endoftext|>"):
        make(ollama_client, model_name, path, template=bos + GO, parameters={"num_ctx": 512})
        counted[bos] = ollama_client.chat(model_name, USER, options={"num_predict": 1})["prompt_eval_count"]
    assert counted["<|endoftext|>"] == counted[""] + 1
    assert END_OF_TEXT == 0


def test_older_turns_are_dropped_in_silence(ollama_client: Ollama, model_name: str, tiny_gguf: Path) -> None:
    """Silent wrong 14."""
    make(ollama_client, model_name, tiny_gguf, template=GO, parameters={"num_ctx": 128})
    long = {"role": "user", "content": "word " * 40}
    messages = [long, {"role": "assistant", "content": "a"}, {"role": "user", "content": "And now?"}]
    shown = ollama_client.prompt(model_name, messages)
    assert "word" not in shown and shown.endswith("[user]And now?<|im_start|>assistant\n")


def test_only_generate_with_raw_is_raw(
    ollama_url: str, ollama_client: Ollama, model_name: str, tiny_gguf: Path
) -> None:
    """`/v1/completions` puts the chat template around every prompt."""
    make(ollama_client, model_name, tiny_gguf, template=GO, parameters={"num_ctx": 512})
    asked = {"model": model_name, "prompt": "abc", "stream": False}
    raw = {**asked, "raw": True, "options": {"num_predict": 1}}
    told = httpx.post(f"{ollama_url}/api/generate", json=raw, trust_env=False, timeout=60).json()
    assert told["prompt_eval_count"] == 3
    answer = httpx.post(
        f"{ollama_url}/v1/completions", json={**asked, "max_tokens": 1}, trust_env=False, timeout=60
    )
    assert answer.json()["usage"]["prompt_tokens"] > 10


def test_ps_names_a_manifest_once(ollama_client: Ollama, model_name: str, tiny_gguf: Path) -> None:
    """One name for two names of one manifest."""
    client = ollama.Client(ollama_client.url, trust_env=False)
    make(ollama_client, model_name, tiny_gguf, template=GO, parameters={"num_ctx": 512})
    ollama_client.copy(model_name, f"{model_name}-2")
    for name in (model_name, f"{model_name}-2"):
        ollama_client.chat(name, USER, options={"num_predict": 1})
    named = [one.model for one in client.ps().models if (one.model or "").startswith(model_name)]
    ollama_client.delete(f"{model_name}-2")
    assert len(named) == 1


def test_before_0_30_there_is_no_jinja(tiny_gguf: Path) -> None:
    """A TEMPLATE is needed; without one the bare prompt goes in."""
    with FakeOllama(
        version="0.12.6", go=lambda text, data: text.replace("{{ .Prompt }}", data["Prompt"])
    ) as old:
        with Ollama(old.url) as server:
            path = write_tiny_gguf(
                tiny_gguf.with_name("other.gguf"), template=ChatTemplate(RENAMED).pinned_source()
            )
            make(server, "forge-test-old", path, parameters={"num_ctx": 512})
            assert server.version() == (0, 12, 6)
            assert server.prompt("forge-test-old", USER) == "Hello?"


@pytest.mark.slow
def test_templates_in_real_go(oracle: Path, tiny_gguf: Path) -> None:
    """`.System` beside the system message writes it twice; legacy templates run once a turn."""
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    cases = {
        "{{ .System }}{{ range .Messages }}[{{ .Role }}]{{ .Content }}{{ end }}": "S[system]S[user]one[assistant]two[user]three",
        "{{ if .System }}<{{ .System }}>{{ end }}[{{ .Prompt }}]{{ .Response }}!": "<S>[one]two![three]",
        "[{{ .Prompt }}]": "[one]two[three]",
    }
    with (
        FakeOllama(go=lambda text, data: real_go.render(oracle, text, data)) as fake,
        Ollama(fake.url) as server,
    ):
        for template, expected in cases.items():
            make(server, "forge-test-go", tiny_gguf, template=template, parameters={"num_ctx": 512})
            assert server.prompt("forge-test-go", messages) == expected
