"""A chat template becomes a Go template that is right wherever it is claimed to be, or is refused."""

# ruff: noqa: E501 - a line end in Jinja is text.
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from forge.chat import go_interpreter
from forge.chat.format import FeatureChoice, NotInferredError, infer
from forge.chat.format_check import NOT_CLAIMED, check_format, compile_template, limit_names
from forge.chat.go_expression import GoTemplateError
from forge.chat.go_template import quoted, to_go
from forge.chat.hand_over import hand_over, write_modelfiles
from forge.chat.renderer import TemplateLimitError
from forge.chat.template import ChatTemplate, Message
from forge.cli.main import run_command
from tests.makers.tokenizer import CHATML

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML_GO = """{{- range .Messages }}
{{- if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}
{{- else if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}
{{- else if eq .Role "assistant" }}{{ "<|im_start|>assistant\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}
{{- end }}
{{- end }}{{ "<|im_start|>assistant\\n" }}"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set told = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set told = false %}{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and told != false %}{% set content = '<<SYS>>\\n' + told + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content + ' [/INST]' }}
{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}
{% endfor %}"""
LAST_USER = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set told = messages[0].content %}
{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST]
{%- if loop.last and told is defined %}{{ told + '\\n\\n' }}{% endif %}{{ m.content }}[/INST]
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
DEFAULT = """{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|system|>\\nYou help.<|end|>\\n' }}{% endif %}
{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
REPLY = "{% if add_generation_prompt %}[assistant]{% endif %}"


def test_chatml_is_exact_and_reads_well() -> None:
    found = compile_template(ChatTemplate(CHATML, TOKENS), add_bos=False)
    assert (found.status, found.go, found.stops) == ("exact", CHATML_GO, ("<|im_end|>", "</s>"))
    assert found.checked > 250


@pytest.mark.parametrize("add_bos", [True, False])
def test_systems_folded_into_a_user_message(add_bos: bool) -> None:
    """Silent wrongs 1 and 3: into the first, into the last; BOS is written by one side alone."""
    for source, policy in ((LLAMA_2, "turn"), (LAST_USER, "held")):
        template = ChatTemplate(source, TOKENS)
        found = compile_template(template, add_bos=add_bos)
        assert found.go is not None and found.chat is not None, found.reason
        assert found.chat.system == policy
        assert found.stops == ("</s>",)
        messages: list[Message] = [
            {"role": "system", "content": "Be {{ brief }}."},
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": 'Three """'},
        ]
        text = template.render(messages, add_generation_prompt=True)
        assert text.startswith("<s>") and found.claims(tuple(messages))
        expected = text.removeprefix("<s>") if add_bos else text
        assert go_interpreter.parse_go(found.go).render(messages) == expected


def test_a_default_system_prompt_is_kept_and_told() -> None:
    """Silent wrong 2."""
    found = compile_template(ChatTemplate(DEFAULT, TOKENS), add_bos=True)
    assert found.chat is not None and found.chat.default_system == "You help."
    assert found.go is not None and "You help." in found.go


@pytest.mark.parametrize(
    ("source", "limits"),
    [
        (CHATML.replace("message['content']", "message['content'] | trim"), None),
        ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
         "[{{ m.role }}]{{ m.content }}</s>{% endfor %}" + REPLY, ["a system message"]),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}</s>{% endfor %}" + REPLY,
         ['text that contains "</think>"']),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content or 'nothing' }}</s>{% endfor %}" + REPLY,
         ["an empty message"]),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content.strip() }}</s>{% endfor %}" + REPLY,
         ["text with leading or trailing whitespace"]),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content[:2000] }}</s>{% endfor %}" + REPLY,
         ["text of 2,000 characters or more"]),
        ("{% for m in messages %}[{{ m.role }}]{% if m.content | length > 3000 %}!{% endif %}{{ m.content }}</s>{% endfor %}" + REPLY,
         ["text of 3,000 characters or more"]),
        ("{% for m in messages %}[{{ m.role }}]{% if loop.index > 16 %}!{% endif %}{{ m.content }}</s>{% endfor %}" + REPLY,
         ["16 messages or more"]),
    ],
)  # fmt: skip
def test_limits_are_named(source: str, limits: list[str] | None) -> None:
    found = compile_template(ChatTemplate(source, TOKENS), add_bos=False)
    if limits is None:
        assert found.go is not None
        return
    assert (found.status, limit_names(found.limits)) == ("exact-with-limits", limits)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not show the text of user"),
        ("{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}", "more than once"),
        ("{{ messages[0].content }} and {{ messages[-1].content }} too", "more than once"),
        ("{{ raise_exception('never') }}", "refuses even a single user message (the chat template refuses the conversation: never)"),
        ("{% for m in messages %}[{{ m.role }}{{ m.content | length }}]{{ m.content }}</s>{% endfor %}", "for user"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | replace('b', 'c') }}</s>{% endfor %}", "for user"),
    ],
)  # fmt: skip
def test_refusals_tell_why(source: str, reason: str) -> None:
    found = compile_template(ChatTemplate(source, TOKENS), add_bos=False)
    assert (found.status, found.go) == ("refused", None)
    assert found.reason is not None and reason in found.reason


def test_what_is_never_claimed() -> None:
    """`exact` speaks of a system message, then user and assistant in turn, the user last."""
    found = compile_template(ChatTemplate(CHATML, TOKENS), add_bos=False)
    for roles, claimed in (
        ("user", True), ("system user assistant user", True), ("user user", False), ("user tool user", False),
        ("user assistant", False), ("assistant user", False), ("user system user", False), ("system", False),
    ):  # fmt: skip
        assert found.claims(tuple({"role": role, "content": "x"} for role in roles.split())) is claimed


def test_the_day_and_the_variables_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{{ strftime_now('%d %b %Y') }}{% if enable_thinking %}{% endif %}" + CHATML, encoding="utf-8"
    )
    assert run_command(["template", str(path)]) == 0
    shown = capsys.readouterr()
    said = shown.out + shown.err
    assert "it writes a date: the text has 2024-07-26 for good" in said
    assert "it reads enable_thinking: the text has them undefined" in said
    assert run_command(["template", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["day"], told["variables_read"]) == ("2024-07-26", ["enable_thinking"])


def test_the_smallest_counter_example_is_shown() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('&', '+') }}</s>{% endfor %}"
    found = compile_template(ChatTemplate(source, TOKENS), add_bos=False)
    assert found.reason is not None and 'for user "&" it writes "' in found.reason


def test_a_bos_that_training_never_saw_is_refused(tmp_path: Path) -> None:
    """The tokenizer writes it, the template does not: whatever the TEMPLATE, the tokens are others."""
    found = compile_template(ChatTemplate(CHATML, TOKENS), add_bos=True)
    assert found.status == "refused" and found.go is None
    assert found.reason is not None and found.reason.startswith(
        "the tokenizer writes <s> in front of every prompt"
    )
    only_system = "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}" + CHATML
    assert compile_template(ChatTemplate(only_system, TOKENS), add_bos=True).status == "refused"
    only_alone = "{% if messages[0].role != 'system' %}{{ bos_token }}{% endif %}" + CHATML
    assert compile_template(ChatTemplate(only_alone, TOKENS), add_bos=True).status == "refused"


def test_an_endless_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.chat.renderer.SECONDS", 0.3)
    loops = "".join("{% for a in range(99999) %}" for _ in range(5)) + "{% endfor %}" * 5
    with pytest.raises(TemplateLimitError, match=r"took more than 0\.3 seconds to compute"):
        compile_template(ChatTemplate(loops + CHATML, TOKENS), add_bos=False)


FAULTS = {
    "a newline dropped": ("<|im_end|>\\n", "<|im_end|>"),
    "the end of turn dropped": ("<|im_end|>", ""),
    "the system turn dropped": ('"<|im_start|>system\\n" }}{{ .Content }}', '"<|im_start|>system\\n" }}'),
    "a BOS written": ("{{- range", '{{ "<s>" }}{{- range'),
    "an EOS after every answer": (
        '.Content }}{{ "<|im_end|>\\n" }}\n{{- end',
        '.Content }}{{ "</s>" }}\n{{- end',
    ),
    "the reply not opened": ('{{- end }}{{ "<|im_start|>assistant\\n" }}', "{{- end }}"),
    "thinking opened": (
        '{{- end }}{{ "<|im_start|>assistant\\n',
        '{{- end }}{{ "<|im_start|>assistant\\n<think>\\n',
    ),
    "roles swapped": ('eq .Role "user"', 'eq .Role "assistant"'),
    "another role's name": ("<|im_start|>user", "<|im_start|>human"),
    "a space after the role": ("user\\n", "user\\n "),
    "another token": ("<|im_start|>", "<|turn|>"),
}


@pytest.mark.parametrize("fault", [*FAULTS, "the default system prompt lost"])
def test_seeded_faults_are_caught(fault: str) -> None:
    """The check sees each of 12 faults in a Go text that was right."""
    source, (old, new) = (CHATML, FAULTS[fault]) if fault in FAULTS else (DEFAULT, ("You help.", ""))
    template = ChatTemplate(source, TOKENS)
    chat, add_bos = infer(template), source == DEFAULT
    go = to_go(chat, add_bos=add_bos)
    assert check_format(template, chat, go, add_bos=add_bos).go == go
    assert go.replace(old, new) != go
    assert check_format(template, chat, go.replace(old, new), add_bos=add_bos).status == "refused"


def test_a_wrong_format_is_caught() -> None:
    """The system text put into another place than the template's."""
    template = ChatTemplate(DEFAULT, TOKENS)
    chat = infer(template)
    moved = replace(chat, system="held", prefix={**chat.prefix, "user": FeatureChoice("<|user|>\n\x00")})
    assert check_format(template, chat, to_go(moved, add_bos=True), add_bos=True).status == "refused"
    with pytest.raises(NotInferredError, match="refuses even"):
        infer(ChatTemplate("{{ raise_exception('x') }}"))


@pytest.mark.parametrize(
    "text",
    [
        "{{ .System }}", "{{ range .Tools }}{{ end }}", "{{ if .Role }", "{{ end }}", "{{ else }}", "{{ printf .Role }}",
        "{{ range .Messages }}", '{{ if eq .Role }}{{ end }}', '{{ "a\\x41" }}', "{{ break }}", "{{ template `x` }}",
        "{{ .Messages }}", "{{ $x }}", "{{ .Role | len }}", "{{ if $x := 1 }}{{ end }}", "{{ index .Messages 0 }}",
        '{{ define "x" }}{{ end }}', "{{ slice .Messages 1 0 }}", "{{ json .Messages }}", "{{ true }}", "{{ and }}",
        '{{ eq "a" 1 }}', "{{ (len .Messages }}", "{{ .Content }}",
    ],
)  # fmt: skip
def test_the_interpreter_takes_nothing_else(text: str) -> None:
    with pytest.raises(GoTemplateError):
        go_interpreter.parse_go(text).render([{"role": "user", "content": "x"}])


def test_literals_survive_a_modelfile() -> None:
    text = 'a "b" \\ {{ x }} """\n\t\r\u00a0\u200b\u2028漢🙂\U000e0001'
    assert quoted(text).isprintable()
    assert '"""' not in quoted(text)
    assert go_interpreter.parse_go("{{ " + quoted(text) + " }}").render([]) == text


def test_modelfiles_carry_it(tmp_path: Path) -> None:
    template = ChatTemplate(DEFAULT, TOKENS)
    told = hand_over(template, add_bos=True, stops=["<|end|>"], context_tokens=4096)
    facts = write_modelfiles(tmp_path, file="m.gguf", handed=told)
    go = compile_template(template, add_bos=True).go
    assert (tmp_path / "Modelfile").read_text() == (
        f'FROM ./m.gguf\nTEMPLATE """{go}"""\nPARAMETER stop "<|end|>"\nPARAMETER num_ctx 4096\n'
    )
    assert facts.modelfile == "Modelfile" and facts.reason is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML, encoding="utf-8")
    assert run_command(["template", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told.pop("conversations_checked") > 250
    assert told == {
        "status": "exact", "limits": [], "reason": None, "go": CHATML_GO, "stops": ["<|im_end|>"],
        "default_system": None, "day": None, "variables_read": [], "not_claimed": list(NOT_CLAIMED),
    }  # fmt: skip
    path.write_text(DEFAULT, encoding="utf-8")
    assert run_command(["template", str(path)]) == 2
    assert "give them: --bos" in capsys.readouterr().err
    assert run_command(["template", str(path), "--bos", "<s>"]) == 0
