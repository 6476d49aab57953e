"""Templates that eat time or memory: one clear error in seconds, wherever one is rendered."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from forge.chat import renderer
from forge.chat.format_check import compile_template
from forge.chat.go_expression import GoTemplateError
from forge.chat.go_interpreter import parse_go
from forge.chat.hand_over import HandOver
from forge.chat.same_prompts import compare_prompts
from forge.chat.template import ChatTemplate
from forge.errors import DataError
from forge.serve.ollama_talks import choose
from tests.conftest import copy_of_tiny, link_converters
from tests.makers.tokenizer import CHATML
from tests.models import change_json
from tests.shipping import Workshop

ENDLESS = "".join("{% for a in range(99999) %}" for _ in range(5)) + "{% endfor %}" * 5
GREEDY = (
    "{% set ns = namespace(x='a' * 9999) %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (ENDLESS, "prompt took more than 0.5 seconds to compute"),
        ("{{ 9 ** (9 ** 9) }}", "took more than 0.5 seconds|takes more than 1024 MiB"),
        ("{{ 'x' * 10 ** 10 }}", "takes more than 1024 MiB of memory"),
        ("{{ 'a' | center(99999999999) }}", "takes more than 1024 MiB of memory"),
        ("{{ '%09999999999d' % 1 }}", "takes more than 1024 MiB of memory"),
        (GREEDY, "takes more than 1024 MiB of memory|took more than"),
        ("{{ 'x' * 20000000 }}", "writes a prompt of more than 10,000,000 characters"),
    ],
)
def test_it_is_stopped_and_the_next_one_is_not(
    monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    monkeypatch.setattr(renderer, "SECONDS", 0.5)
    hostile, good = ChatTemplate(source), ChatTemplate(CHATML)
    before = good.render(HELLO)
    for _ in range(2):  # the second time without trying
        with pytest.raises(renderer.TemplateLimitError, match=reason):
            hostile.render(HELLO)
    assert good.render(HELLO) == before


@pytest.mark.parametrize(
    "source", ["{{" + "(" * 3000 + ")" * 3000 + "}}", "{% if x %}" * 999 + "{% endif %}" * 999]
)
def test_deep_nesting_is_no_bug(source: str) -> None:
    with pytest.raises(DataError, match="nested too deep"):
        ChatTemplate(source)


def test_many_slow_prompts_are_too_slow_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "SECONDS_IN_ALL", 0.2)
    monkeypatch.setattr(renderer, "SECONDS_ON_AVERAGE", 0.001)
    slow = ChatTemplate("{% for a in range(50000) %}{% endfor %}" * 4 + CHATML + " ")
    with pytest.raises(renderer.TemplateLimitError, match=r"seconds to compute \d+ prompts"):
        for _ in range(10_000):
            slow.render(HELLO)


def test_a_process_that_was_killed_is_started_again() -> None:
    template = ChatTemplate(CHATML + "again")
    before = template.render(HELLO)
    child = renderer._renderer._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    assert template.render(HELLO) == before


def test_a_row_of_ten_megabytes_is_no_fault_of_the_template() -> None:
    words = "word " * (renderer.LONGEST_TEXT // 5 + 1)
    assert words in ChatTemplate(CHATML).render([{"role": "user", "content": words}])


def test_threads_share_it() -> None:
    template, texts = ChatTemplate(CHATML), dict[int, str]()

    def ask(number: int) -> None:
        for _ in range(50):
            texts[number] = template.render([{"role": "user", "content": str(number)}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {number: str(number) in text for number, text in texts.items()} == dict.fromkeys(range(4), True)


def test_every_comparison_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is endless from the second turn on: an import and a comparison end, nothing is claimed."""
    monkeypatch.setattr(renderer, "SECONDS", 0.3)
    late = ChatTemplate("{% if messages | length > 1 %}" + ENDLESS + "{% endif %}" + CHATML)
    good = compile_template(ChatTemplate(CHATML), add_bos=False)
    handed = HandOver(late, False, good, ("<|im_end|>",), 4096)
    for look in (lambda: compare_prompts(handed, late.source, None), lambda: choose(handed, "jinja")):
        with pytest.raises(renderer.TemplateLimitError, match=r"took more than 0\.3 seconds to compute"):
            look()


def test_loops_of_a_go_template_end() -> None:
    loops = "{{ range .Messages }}" * 6 + "x" + "{{ end }}" * 6
    with pytest.raises(GoTemplateError, match="more than 1,000,000 steps"):
        parse_go(loops.replace("range .Messages", "range $.Messages")).render(HELLO * 30)


@pytest.mark.programs
@pytest.mark.training
def test_five_commands_refuse_it(tmp_path: Path) -> None:
    """A hostile template in a base: `ship`, `plan`, `template`, `modelfile` and `verify` say so."""
    workshop = Workshop(tmp_path, link_converters(tmp_path / "home"))
    base = copy_of_tiny(tmp_path / "base")
    exported = workshop.forge(
        "export", "--base", str(base), "--quant", "f16", "--out", str(tmp_path / "m.gguf")
    )
    assert exported.code == 0, exported.said
    hostile = "{% if messages | length > 0 %}" + ENDLESS + "{% endif %}" + CHATML
    if (base / "chat_template.jinja").exists():
        (base / "chat_template.jinja").write_text(hostile)
    else:
        change_json(base / "tokenizer_config.json", chat_template=hostile)
    (tmp_path / "r.yaml").write_text(
        f"name: r\nbase: {base}\ndata: {{source: builtin:yoda}}\ndeploy: {{runtime: none}}\n"
    )
    for command in (
        ["ship", "r.yaml"], ["template", str(base)], ["modelfile", str(base)],
        ["verify", "--base", str(base), "--gguf", str(tmp_path / "m.gguf")], ["plan", "r.yaml"],
    ):  # fmt: skip
        began = time.monotonic()
        answer = workshop.forge(*command)
        assert time.monotonic() - began < 90, command
        if command[0] != "plan":  # which renders nothing before the data is there
            assert answer.code == 2, (command, answer.said)
            assert "took more than 3 seconds to compute" in answer.said, (command, answer.said)
        assert "Traceback" not in answer.said and "a bug" not in answer.said, (command, answer.said)
