"""`forge template --check`: Modelfiles as people write them, run as Ollama runs them; real Go says the same."""

# ruff: noqa: E501 - templates are written in one line each
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.chat import go_interpreter, probe
from forge.chat.go_expression import GoTemplateError
from forge.chat.hand_over import hand_over
from forge.chat.modelfile import Modelfile, parse_modelfile
from forge.chat.modelfile_check import as_ollama, check_modelfile
from forge.chat.template import ChatTemplate
from forge.cli.main import run_command
from tests import real_go
from tests.fake_ollama_prompts import CHATML_GO
from tests.families import FAMILIES
from tests.makers.tokenizer import CHATML
from tests.test_template_compile import DEFAULT, TOKENS

# As in Ollama's library and in people's posts.
LEGACY_CHATML = "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
LEGACY_WITHOUT_RESPONSE = "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
LIBRARY = """{{- if .Messages }}
{{- if or .System .Tools }}<|im_start|>system
{{- if .System }}
{{ .System }}
{{- end }}
{{- if .Tools }} tools {{ range .Tools }}{{ . }}{{ end }}{{ end }}<|im_end|>
{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if .Content }}{{ .Content }}
{{- else if .ToolCalls }}<tool_call>{{ range .ToolCalls }}{{ .Function.Name }}{{ end }}</tool_call>
{{- end }}{{ if not $last }}<|im_end|>
{{ end }}
{{- end }}
{{- if and (ne .Role "assistant") $last }}<|im_start|>assistant
{{ end }}
{{- end }}
{{- else }}{{ .Prompt }}{{ end }}{{/* as in the library */}}"""
INSIDE_IF = "{{ with .System }}<<{{ . }}>>{{ end }}[{{ .Prompt }}]{{ if .Response }}{{ .Response }}!{{ if true }}x{{ end }}{{ else }}?{{ end }}."


def checked(
    template: str, source: str = "{{ bos_token }}" + CHATML, **fields: Any
) -> tuple[list[str], list[str]]:
    told = hand_over(ChatTemplate(source, TOKENS), add_bos=True, stops=["<|im_end|>"], context_tokens=64)
    stops = {"stop": ("<|im_end|>",)}
    found = check_modelfile(Modelfile("x", template=template, **{"parameters": stops, **fields}), told)
    limits = [one.name for one in found.prompts.limits] if found.prompts else []
    return [str(problem) for problem in found.problems], limits


@pytest.mark.parametrize("template", [LIBRARY, CHATML_GO])
def test_good_ones(template: str) -> None:
    problems, limits = checked(template)
    assert problems == []
    assert all("empty" in limit or "system message after" in limit for limit in limits)


def test_a_bos_that_the_chat_template_lacks() -> None:
    problems, _ = checked(CHATML_GO, CHATML)
    assert any("the tokenizer writes <s> in front of every prompt" in problem for problem in problems)


def test_a_legacy_template_is_right_in_every_turn() -> None:
    """`.Response` closes the earlier turns; without it the answers run into the next question."""
    problems, limits = checked(LEGACY_CHATML)
    assert problems == [] and limits
    problems, _ = checked(LEGACY_WITHOUT_RESPONSE)
    assert problems and "<|im_end|>" in problems[0]


BAD = {
    "a BOS beside the tokenizer's": ("<s>" + CHATML_GO, "it begins with <s>, which the tokenizer writes too"),
    "a newline lost": (CHATML_GO.replace("<|im_end|>\n", "<|im_end|>"), "do not follow from the messages' roles"),
    "the system message twice": ("{{ .System }}" + CHATML_GO, "do not follow from the messages' roles"),
    "the generation prompt lost": (CHATML_GO.replace("{{ end }}<|im_start|>assistant\n", "{{ end }}"), "do not follow"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_ones(fault: str) -> None:
    """Silent wrongs 1 and 3, with the smallest conversation that shows them."""
    template, said = BAD[fault]
    problems, _ = checked(template)
    assert any(said in problem for problem in problems), problems
    assert any("for user" in problem or "for system" in problem for problem in problems)


def test_a_default_system_prompt_may_stand_in_system() -> None:
    """Silent wrong 2: SYSTEM in the Modelfile does what the Jinja does by itself."""
    go = "{{- range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n"
    problems, _ = checked(go, DEFAULT, system="You help.")
    assert problems == []
    problems, _ = checked(go, DEFAULT)
    assert "You help." in problems[0]


def test_stops_messages_and_what_is_not_run() -> None:
    problems, _ = checked(CHATML_GO, parameters={"stop": ("</s>",)})
    assert problems == ["stops: no PARAMETER stop for <|im_end|>: a reply may not end"]
    told = hand_over(ChatTemplate(CHATML), add_bos=False, stops=[], context_tokens=64)
    found = check_modelfile(Modelfile("x", messages=(("user", "hi"),), renderer="qwen3"), told)
    assert [note.partition(":")[0] for note in found.notes] == [
        "1 MESSAGEs stand in front of every conversation", "RENDERER and PARSER are the server's own code", "no TEMPLATE",
    ]  # fmt: skip
    with pytest.raises(GoTemplateError, match="currentDate"):
        checked("{{ currentDate }}" + CHATML_GO)


@pytest.mark.parametrize("name", FAMILIES)
def test_forges_own_hold(name: str) -> None:
    """Every example of Modelfiles/, read from its text."""
    family = FAMILIES[name]
    path = Path(__file__).parent.parent / "Modelfiles" / f"{name}.Modelfile"
    found = check_modelfile(parse_modelfile(path.read_text(encoding="utf-8")), family.hand_over())
    assert found.problems == () and found.prompts is not None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(
        f'FROM x\nTEMPLATE """{CHATML_GO}"""\nPARAMETER stop <|im_end|>\nPARAMETER mirostat 1\n'
    )
    command = ["template", str(tmp_path / "chat.jinja"), "--check", str(modelfile)]
    assert run_command([*command, "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out.splitlines()[-1])
    assert (told["status"], told["stops"]) == ("exact", ["<|im_end|>"]) and told[
        "conversations_checked"
    ] > 200
    assert "line 7: the server ignores PARAMETER mirostat" in said.err
    modelfile.write_text(modelfile.read_text().replace("user", "human").replace(".Role", '"human"'))
    assert run_command(command) == 5
    error = capsys.readouterr().err
    assert "Modelfile: TEMPLATE: " in error and "for user" in error and "hint: forge modelfile" in error
    assert run_command(["template", str(tmp_path / "chat.jinja"), "--check", str(tmp_path / "none")]) == 2


@pytest.mark.programs
@pytest.mark.slow
def test_real_go_runs_them_the_same(oracle: Path) -> None:
    """.Messages templates over all conversations; expressions one by one."""
    conversations = list(probe.conversations([], has_system=True))
    jobs: list[Mapping[str, Any]] = [
        {"template": one, "conversations": conversations} for one in (LIBRARY, CHATML_GO)
    ]
    for template, found in zip((LIBRARY, CHATML_GO), real_go.run(oracle, jobs), strict=True):
        ours = as_ollama(Modelfile("x", template=template))
        assert [ours(chat) for chat in conversations] == found["texts"]
    data = {"System": "S", "Prompt": "P", "Response": "", "Messages": []}
    turns = {"system": "S", "prompt": "P", "response": "", "conversations": [[]]}
    for template in EXPRESSIONS:
        (found,) = real_go.run(oracle, [{"template": template, **turns}])
        assert go_interpreter.parse_go(template).run({**data, "Messages": ()}) == found["texts"][0], template


EXPRESSIONS = (
    '{{ if and .System .Prompt }}1{{ else }}2{{ end }}{{ if and .Response .System }}1{{ else if or .Response .Prompt }}2{{ end }}',
    '{{ or .Response .Prompt }}|{{ and .Response .Prompt }}|{{ and .System .Prompt }}|{{ or .Response "" }}',
    '{{ with .System }}[{{ . }}]{{ else }}none{{ end }}{{ with .Response }}[{{ . }}]{{ else }}none{{ end }}',
    '{{ if ne .System "S" }}a{{ else if eq .Prompt "x" "P" }}b{{ end }}{{ len "é" }}{{ len .Messages }}',
    '{{ range .Messages }}x{{ else }}empty{{ end }}{{- /* gone */ -}}  tail {{- "" -}}  end',
    '{{ if gt 2 1 }}a{{ end }}{{ if ge 1 1 }}b{{ end }}{{ if le 2 1 }}c{{ end }}{{ if lt -1 0 }}d{{ end }}{{ 7 }}',
    '{{ $x := "a" }}{{ if .System }}{{ $x = "b" }}{{ end }}{{ $x }}{{ `raw "{{" text` }}{{ $.System }}',
    '{{ if not (and (eq .System "S") (not .Response)) }}a{{ else }}b{{ end }}',
)  # fmt: skip


def test_the_last_turn_is_cut_where_the_response_goes() -> None:
    """Also inside a block; what follows is there for the earlier turns alone."""
    render = as_ollama(Modelfile("x", template=INSIDE_IF))
    assert render(probe.conversation(["a", "b", "c"], system="s")) == "<<s>>[a]b!x.[c]"
