"""The limit on a template's time, in any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from forge.chat.format_check import compile_template
from forge.chat.hand_over import HandOver
from forge.chat.modelfile_check import check_modelfile
from forge.chat.same_prompts import compare
from forge.chat.template import ChatTemplate
from forge.chat.time_limit import time_limit
from forge.errors import DataError
from forge.serve.ollama import _generated
from tests.makers.tokenizer import CHATML

ENDLESS = "".join("{% for a in range(99999) %}" for _ in range(5)) + "{% endfor %}" * 5


def in_thread(function: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found[0]


def spin(seconds: float) -> str:
    try:
        with time_limit(seconds):
            while True:
                pass
    except TimeoutError:
        return "stopped"


@pytest.mark.parametrize(
    "where", [in_thread, lambda function: function()], ids=["a thread", "the main thread"]
)
def test_it_stops_a_loop(where: Callable[[Callable[[], object]], object]) -> None:
    assert where(lambda: spin(0.05)) == "stopped"


def test_an_endless_template_is_refused_in_a_thread() -> None:
    found = in_thread(
        lambda: compile_template(ChatTemplate(ENDLESS + CHATML), add_bos=True, seconds=0.2).reason
    )
    assert found == "its prompts took more than 0.2 seconds to compute"


def test_every_place_that_renders_a_foreign_template_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is endless from the second turn on: an import, a comparison and a check all end."""
    monkeypatch.setattr("forge.chat.time_limit.SECONDS", 0.3)
    late = ChatTemplate("{% if messages | length > 1 %}" + ENDLESS + "{% endif %}" + CHATML)
    good = compile_template(ChatTemplate(CHATML), add_bos=False)
    told = HandOver(late, False, good, ("<|im_end|>",), 4096)
    for look in (
        lambda: compare(told, late.source, None),
        lambda: check_modelfile(told.modelfile("go", "x"), told),
        lambda: _generated(told, "jinja"),
    ):
        with pytest.raises(DataError, match=r"took more than 0\.3 seconds to compute"):
            look()


def test_waiting_does_not_count() -> None:
    """A busy machine is no fault of the template's."""
    with time_limit(0.1):
        time.sleep(0.3)


def test_the_inner_limit_is_not_the_outer_one() -> None:
    with time_limit(60):
        assert spin(0.05) == "stopped"
    assert spin(0.05) == "stopped"


def test_nothing_arrives_after_the_block() -> None:
    """The end of the block and the limit may meet; afterwards all is quiet, no thread is left."""
    for _ in range(20):
        try:
            with time_limit(0.01):
                end = time.thread_time() + 0.0095
                while time.thread_time() < end:
                    pass
        except TimeoutError:
            pass
        for _ in range(1000):
            pass
    watchers = [thread for thread in threading.enumerate() if thread.name == "time-limit"]
    for watcher in watchers:
        watcher.join(10)  # the limit may have met the end itself; whoever still watches does so for ever
    assert not any(watcher.is_alive() for watcher in watchers)
