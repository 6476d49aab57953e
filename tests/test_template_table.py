"""Every packaged chat template beside its Go template: exact, exact with limits, or refused; never wrong."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from forge import process
from forge.chat import go_interpreter, probe
from forge.chat.format_check import CompiledTemplate, compile_template, limit_names, unseen_bos
from forge.chat.probe import Conversation
from forge.chat.template import ChatTemplate
from tests import real_go
from tests.vocabularies import template_files, trl_templates

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
FAMILIES = ("llama3", "gemma", "phi3", "qwen2_5", "qwen3", "cohere", "deepseekv3")
# They raise without tools, or read lists of parts (images) and show no plain text.
NOT_TEXT_CHAT = {
    "CohereForAI-c4ai-command-r-plus-tool_use.jinja", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use.jinja",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja", "fireworks-ai-llama-3-firefunction-v2.jinja",
    "idefics3.jinja", "idefics3_training.jinja", "llava_next.jinja", "llava_next_training.jinja",
    "smolvlm.jinja", "smolvlm_training.jinja",
}  # fmt: skip


def compiled(path: Path) -> tuple[ChatTemplate, CompiledTemplate]:
    template = ChatTemplate(path.read_text(encoding="utf-8"), TOKENS)
    return template, compile_template(template, add_bos=writes_bos(template))


def writes_bos(template: ChatTemplate) -> bool:
    """As in the models: the tokenizer writes BOS where the template has one."""
    return not unseen_bos(template, add_bos=True)


def claimed(template: ChatTemplate, found: CompiledTemplate) -> list[Conversation]:
    """The check's conversations with other random ones; no limit may take the plain ones away."""
    assert found.chat is not None
    has_system = found.chat.system != "refused"
    told = probe.literals(template)
    every = list(probe.conversations(told, has_system=has_system, seed=1))
    plain = every[: 12 if has_system else 6]
    assert all(found.claims(one) for one in plain)
    return [one for one in every if found.claims(one)]


def wrong(template: ChatTemplate, texts: Sequence[str], conversations: Sequence[Conversation]) -> int:
    bos = TOKENS["bos_token"] if writes_bos(template) else ""
    expected = [template.render(one, add_generation_prompt=True) for one in conversations]
    return sum(bos + text != other for text, other in zip(texts, expected, strict=True))


def ours(found: CompiledTemplate, conversations: Sequence[Conversation]) -> list[str]:
    assert found.go is not None
    parsed = go_interpreter.parse_go(found.go)
    return [parsed.render(one) for one in conversations]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str) -> None:
    """M1: also on random conversations that the check has not seen."""
    template, found = compiled(trl_templates() / f"{family}.jinja")
    conversations = claimed(template, found)
    assert len(conversations) > 60
    assert wrong(template, ours(found, conversations), conversations) == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong = 0; at least nine of ten templates that are text chat are exact or exact with limits."""
    rows, errors = [], 0
    count: Counter[str] = Counter()
    for path in template_files():
        template, found = compiled(path)
        if found.go is not None:
            conversations = claimed(template, found)
            errors += wrong(template, ours(found, conversations), conversations)
        is_chat = path.name not in NOT_TEXT_CHAT
        count[found.status if is_chat else "not text chat"] += 1
        assert is_chat or found.status == "refused", path.name
        why = found.reason or "; ".join(limit_names(found.limits))
        rows.append(f"{path.name:52} {found.status:18} {found.checked:5} {why}")
    with capsys.disabled():
        text = "\n".join(["", *rows, str(dict(count)), f"wrong: {errors}"])
        print(text)  # noqa: T201 - the table is the point
    assert errors == 0
    assert count["not text chat"] == len(NOT_TEXT_CHAT), "one of them is gone, or has another name"
    assert count["exact"] + count["exact-with-limits"] >= 9 * count["refused"]


@pytest.mark.programs
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_real_go_writes_the_same(oracle: Path) -> None:
    """The emitted text under Go's own text/template: wrong = 0 over the whole table."""
    jobs: list[Mapping[str, Any]] = []
    expected = []
    for path in template_files():
        template, found = compiled(path)
        if found.go is None:
            continue
        conversations = claimed(template, found)
        assert wrong(template, ours(found, conversations), conversations) == 0
        jobs.append({"template": found.go, "conversations": conversations})
        expected.append({"texts": ours(found, conversations)})
    assert real_go.run(oracle, jobs) == expected
    assert len(jobs) > 100


@pytest.mark.programs
def test_one_template_takes_less_than_two_seconds() -> None:
    """The whole command, for one of the longest templates; in computing time, doubled for slow processors."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    path = trl_templates() / "muse_glimmer.jinja"
    command = [sys.executable, "-m", "forge", "template", str(path), "--bos", "<s>", "--eos", "</s>"]
    assert process.run(command).status == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4
