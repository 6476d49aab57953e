"""The protocol between forge and its workers: results, errors, prints, deaths and interrupts."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from forge import process, report, worker
from forge.errors import (
    CheckError,
    InterruptedByUserError,
    MissingToolError,
    OutOfMemoryError,
    Problem,
    StageError,
)
from tests.servers import own_servers
from tests.test_process import wait_until_gone
from tests.worker_tasks import Order, Receipt, deliver

pytestmark = pytest.mark.programs


class Said:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def text(self, kind: str, text: str) -> None:
        self.calls.append((kind, text))

    def table(self, title: str, columns: object, rows: object) -> None:
        self.calls.append((title, columns, rows))

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        self.calls.append((label, done, total, note))


@pytest.fixture
def said() -> Said:
    sink = Said()
    report.configure(sink=sink, verbose=True)
    return sink


@pytest.fixture(autouse=True)
def _tasks_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers that are started know the tasks in tests/worker_tasks.py."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setattr(worker, "COMMAND", [sys.executable, "-m", "tests.worker_tasks"])


def test_a_result_comes_back_with_what_was_said(said: Said, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    result = worker.call("speak", {"words": ["é", 1, None, {"a": [True]}]}, log=log)
    assert result == {"words": ["é", 1, None, {"a": [True]}]}
    assert said.calls == [
        ("info", "hello"),
        ("detail", "more"),
        ("warning", "low"),
        ("a table", ["one", "two"], [[1, None], ["x", 2.5]]),
        ("speak", 0, 2, ""),
        ("speak", 2, 2, "done"),
    ]
    assert log.read_text().splitlines()[1:] == [
        "a print", "a print to standard error", "a program's print", '{"event": "result", "value": "forged"}',
        "a print of C",
    ]  # fmt: skip


def test_progress_is_not_sent_more_often_than_it_is_seen(said: Said) -> None:
    worker.call("hurry", {"steps": 20000})
    assert 2 <= len(said.calls) < 200
    assert said.calls[0][1] == 0 and said.calls[-1][1] == 20000


def test_an_error_keeps_its_class_its_hint_and_all_its_problems(said: Said) -> None:
    with pytest.raises(CheckError) as caught:
        worker.call("fail", {})
    assert str(caught.value) == "two are wrong"
    assert caught.value.hint == "mend them"
    assert caught.value.problems == (Problem("first", "a", "f.txt", 3), Problem("second"))
    assert said.calls == []


def test_a_worker_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything was fetched, at a known revision, before it starts: it could only fetch another."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert worker.call("environment", {"names": ["HF_HUB_OFFLINE"]}) == {"HF_HUB_OFFLINE": "1"}


def test_no_kernel_of_a_hub_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes imports the package `kernels`, where it is installed, to fetch and run one."""
    for name in ("kernels", "colonels"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent}")
    assert worker.call("find", {"name": "colonels"}) == {"found": True}
    assert worker.call("find", {"name": "kernels"}) == {"found": False}


def test_a_bug_is_a_failed_stage_and_its_traceback_is_in_the_log(said: Said, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(
        StageError, match=r"^divide failed: ZeroDivisionError: integer division or modulo by zero$"
    ) as caught:
        worker.call("divide", {}, log=log)
    assert caught.value.hint == f"see the end of {log}"
    assert "Traceback (most recent call last)" in log.read_text()


def test_without_a_log_its_end_is_told_in_detail(said: Said) -> None:
    with pytest.raises(StageError) as caught:
        worker.call("divide", {})
    assert caught.value.hint == "-v shows its last lines"
    [(kind, text)] = said.calls
    assert kind == "detail" and str(text).endswith("ZeroDivisionError: integer division or modulo by zero")


def test_a_missing_package_names_the_way_to_install_it(said: Said) -> None:
    with pytest.raises(MissingToolError, match="the Python package no_such_stack is not installed") as caught:
        worker.call("lack", {})
    assert "forge-ship[train]" in caught.value.hint


def test_lack_of_memory_is_no_bug(said: Said) -> None:
    with pytest.raises(OutOfMemoryError, match="hoard: out of memory"):
        worker.call("hoard", {})


def test_a_worker_that_the_system_killed_for_memory(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B6: the system's count of such kills rose meanwhile, which a kill by hand does not do."""
    monkeypatch.setattr(process, "_CONTROL_GROUP", tmp_path)
    counts = tmp_path / "memory.events"
    counts.write_text("oom 0\noom_kill 7\n", encoding="utf-8")
    with pytest.raises(StageError, match="ended with status -9") as by_hand:
        worker.call("die", {"how": "killed"})
    assert not isinstance(by_hand.value, OutOfMemoryError)
    with pytest.raises(OutOfMemoryError, match="the system killed the worker"):
        worker.call("die", {"how": "killed for memory", "name": str(counts)})


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (
            "killed",
            "ended with status -9 and said nothing; killed from outside, or by the system for lack of memory",
        ),
        ("aborted", "ended with status -6 and said nothing"),
        (
            "asserted",
            "ended with status -6 and said nothing; llama.cpp gave up: m.cpp:7: GGML_ASSERT(n > 0) failed",
        ),
        ("left", "ended with status 3 and said nothing"),
        (
            "cut off",
            "ended with status -9 and said nothing; killed from outside, or by the system for lack of memory",
        ),
    ],
)
def test_a_death_without_a_word(said: Said, tmp_path: Path, how: str, expected: str) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(StageError) as caught:
        worker.call("die", {"how": how}, log=log)
    assert str(caught.value) == f"die: the worker process {expected}"
    assert caught.value.hint == f"see the end of {log}"


_TEAM = tuple({"RANK": str(number)} for number in range(3))


def test_several_workers_do_one_task(said: Said) -> None:
    """What the first says is shown, and its result returned."""
    assert worker.call("part", {}, together=_TEAM) == {"rank": "0"}
    assert said.calls == [("info", "rank 0")]


def test_the_first_finishes_what_it_must_when_all_stop(said: Said) -> None:
    with pytest.raises(InterruptedByUserError):
        worker.call("part", {"how": "stops"}, together=_TEAM[:2])
    assert said.calls == [("info", "rank 0"), ("info", "a checkpoint is written")]


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("fails", CheckError, "the second's own error"),
        ("killed", StageError, "ended with status -9"),
        ("heard of", StageError, "ended with status -9"),  # and the first has lost it, which is no cause
    ],
)
def test_the_first_that_fails_ends_all(said: Said, how: str, kind: type[Exception], words: str) -> None:
    """With its own error, within seconds, though the others hang and would not be asked to stop."""
    began = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        worker.call("part", {"how": how}, together=_TEAM)
    assert str(caught.value).endswith("(process 2 of 3)")
    assert time.monotonic() - began < 15
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if "tests.worker_tasks" in " ".join(child.cmdline())]


def test_a_typed_task_takes_one_class_and_gives_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "TASKS", {"deliver": "tests.worker_tasks:deliver"})
    order = Order((Path("/a/b"), Path("c")), scale=2)
    assert worker.perform(deliver, order) == Receipt(("b", "c"), 2.0, Path("/a"))
    with pytest.raises(StageError, match="Order has no path"):
        worker.call("deliver", {"paths": [], "path": "/a/b"})


@pytest.fixture
def interrupt_at_first_word(said: Said) -> Iterator[list[int]]:
    """Press Ctrl-C as soon as the task says something; gives the pids that it said."""
    pids: list[int] = []

    def press(kind: str, text: str) -> None:
        if text.startswith("pid "):
            pids.append(int(text.removeprefix("pid ")))
            threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        said.calls.append((kind, text))

    said.text = press  # type: ignore[method-assign]
    yield pids
    assert pids
    wait_until_gone(pids)


def test_an_interrupt_stops_the_worker(said: Said, interrupt_at_first_word: list[int]) -> None:
    with pytest.raises(InterruptedByUserError, match="sleep was interrupted"):
        worker.call("sleep", {"seconds": 600})
    assert ("info", "stopping sleep: it finishes what it must (Ctrl-C again kills it)") in said.calls


def test_what_the_task_says_when_it_is_stopped_is_heard(
    said: Said, interrupt_at_first_word: list[int]
) -> None:
    with pytest.raises(InterruptedByUserError, match=r"^stopped at step 7$") as caught:
        worker.call("finish_step", {})
    assert caught.value.hint == "go on from there"
    assert ("info", "a checkpoint is written") in said.calls


def test_a_task_that_is_done_when_it_is_stopped_still_counts_as_interrupted(
    said: Said, interrupt_at_first_word: list[int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        worker.call("finish_all", {})


def test_one_that_does_not_listen_is_killed_after_its_grace(
    said: Said, interrupt_at_first_word: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.process.GRACE_SECONDS", 0.5)
    with pytest.raises(KeyboardInterrupt):
        worker.call("ignore", {})


def test_a_second_interrupt_kills_it(said: Said, interrupt_at_first_word: list[int]) -> None:
    heard = said.text

    def press_again(kind: str, text: str) -> None:
        heard(kind, text)
        if text.startswith("stopping"):
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    said.text = press_again  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        worker.call("ignore", {})


def test_no_process_is_left_after_any_of_this() -> None:
    assert own_servers() == []
