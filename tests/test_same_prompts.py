"""A run's templates beside each other: the same 200 conversations, and every one of twelve faults is seen."""

# ruff: noqa: E501 - one fault a line
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from forge.chat.hand_over import HandOver, hand_over
from forge.chat.modelfile import Modelfile, modelfile_text, parse_modelfile
from forge.chat.same_prompts import compare_prompts
from forge.chat.template import ChatTemplate
from forge.errors import CheckError
from tests.families import FAMILIES

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# Everything that can be lost: BOS, a default system prompt, a date, thinking, an end of turn.
SOURCE = """{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|system|>\\nYou help.<|end|>\\n' }}{% endif %}
{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% if enable_thinking is defined and enable_thinking %}{{ '<think>' }}
{% endif %}{% endif %}"""
TEMPLATE = ChatTemplate(SOURCE, TOKENS)


@pytest.fixture(scope="module")
def told() -> HandOver:
    return hand_over(TEMPLATE, add_bos=True, stops=["<|end|>", "</s>"], context_tokens=4096)


def test_they_are_the_same(told: HandOver) -> None:
    """Also read back out of the Modelfile's text."""
    assert told.compiled.status == "exact-with-limits"
    written = parse_modelfile(modelfile_text(told.modelfile("go", "./m.gguf")))
    done = compare_prompts(told, TEMPLATE.pinned_source(), written)
    assert (done.conversations, len(done.through)) == (200, 3)
    assert len(compare_prompts(told, TEMPLATE.pinned_source(), None).through) == 2


Fault = Callable[[str], str]
_IN_BOTH: dict[str, Fault] = {
    "a newline dropped": lambda text: text.replace("<|end|>\\n", "<|end|>"),
    "the end of turn dropped": lambda text: text.replace("<|end|>", ""),
    "the default system prompt lost": lambda text: text.replace("You help.", ""),
    "another default system prompt": lambda text: text.replace("You help.", "You are helpful."),
    "another role's name": lambda text: text.replace("<|system|>", "<|developer|>"),
    "the reply not opened": lambda text: text.replace("<|assistant|>\\n' }}{% if", "' }}{% if").replace(
        '{{- end }}{{ "<|assistant|>\\n" }}', "{{- end }}"
    ),
    "another token": lambda text: text.replace("<|end|>", "<|eot|>"),
}
_IN_JINJA: dict[str, Fault] = {
    "thinking switched on": lambda text: text.replace(
        "{% set enable_thinking = forge_leaves_this_undefined %}", ""
    ),
    "BOS lost": lambda text: text.replace("{{ bos_token }}", ""),
    "BOS twice": lambda text: text.replace("{{ bos_token }}", "{{ bos_token + bos_token }}"),
    "content trimmed": lambda text: text.replace("m.content", "m.content | trim"),
    "the system turn moved behind the user's": lambda text: text.replace(
        "in messages %}", "in messages | sort(attribute='role', reverse=true) %}"
    ),
    "roles swapped": lambda text: text.replace(
        "m.role + '|>", "('user' if m.role == 'assistant' else m.role) + '|>"
    ),
}
_IN_GO: dict[str, Fault] = {
    "a BOS that the tokenizer writes too": lambda text: '{{ "<s>" }}' + text,
    "the system prompt twice": lambda text: text.replace('eq .Role "system" }}', 'eq .Role "system" }}{{ .Content }}'),
    "thinking opened": lambda text: text + "<think>",
    "roles swapped": lambda text: text.replace('eq .Role "user"', 'eq .Role "assistant"'),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*_IN_BOTH, *_IN_JINJA])
def test_faults_in_the_ggufs_jinja(told: HandOver, fault: str) -> None:
    right = TEMPLATE.pinned_source()
    wrong = (_IN_BOTH | _IN_JINJA)[fault](right)
    assert wrong != right
    with pytest.raises(CheckError, match="the GGUF's Jinja writes another prompt than training did"):
        compare_prompts(told, wrong, None)


@pytest.mark.parametrize("fault", [*_IN_BOTH, *_IN_GO])
def test_faults_in_the_modelfile(told: HandOver, fault: str) -> None:
    right = told.modelfile("go", "./m.gguf")
    assert right.template is not None
    wrong = replace(right, template=(_IN_BOTH | _IN_GO)[fault](right.template))
    assert wrong != right
    with pytest.raises(CheckError, match="the Modelfile's TEMPLATE writes another prompt") as caught:
        compare_prompts(told, TEMPLATE.pinned_source(), wrong)
    assert [problem.field for problem in caught.value.problems] == ["trained on", "the Modelfile's TEMPLATE"]


@pytest.mark.parametrize("name", ["llama-3.2", "gemma", "phi-3", "qwen2.5", "mistral", "llama-2"])
def test_families(name: str) -> None:
    """With dates, folded and refused system messages, trims: where Go has limits they are left out."""
    told = FAMILIES[name].hand_over()
    modelfile: Modelfile = parse_modelfile(modelfile_text(told.modelfile("go", "./m.gguf")))
    assert compare_prompts(told, told.template.pinned_source(), modelfile).conversations == 200


def test_too_few_conversations_prove_nothing(told: HandOver) -> None:
    hello = (
        "{% if messages | length > 1 or messages[0].content != 'x' %}{{ raise_exception('no') }}{% endif %}"
    )
    with pytest.raises(CheckError, match="only 0 generated conversations can be compared"):
        compare_prompts(
            replace(told, template=ChatTemplate(hello + SOURCE, TOKENS)), TEMPLATE.pinned_source(), None
        )


def test_a_date_that_is_not_pinned_is_seen() -> None:
    """Silent wrong 17."""
    dated = ChatTemplate("{{ strftime_now('%d %b %Y') }}\n" + SOURCE, TOKENS)
    told = hand_over(dated, add_bos=False, stops=["<|end|>"], context_tokens=64)
    assert compare_prompts(told, dated.pinned_source(), None).conversations == 200
    with pytest.raises(CheckError, match="the GGUF's Jinja writes another prompt"):
        compare_prompts(told, dated.source, None)
