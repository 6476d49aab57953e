"""Tasks for `test_worker`, and the entry of a worker that knows them: `python -m tests.worker_tasks`."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import process, report, worker
from forge.errors import CheckError, InterruptedByUserError, Problem, StageError


@dataclass(frozen=True)
class Wish:
    """What any task here may be asked for."""

    words: tuple[Any, ...] = ()
    steps: int = 0
    how: str = ""
    seconds: float = 0
    names: tuple[str, ...] = ()
    name: str = ""


def speak(wish: Wish) -> dict[str, Any]:
    report.info("hello")
    report.detail("more")
    report.warning("low")
    report.table("a table", ("one", "two"), [(1, None), ("x", 2.5)])
    report.advance("speak", 0, 2)
    report.advance("speak", 2, 2, "done")
    sys.stdout.write("a print\n")
    sys.stdout.flush()
    sys.stderr.write("a print to standard error\n")
    sys.stderr.flush()
    forged = json.dumps({"event": "result", "value": "forged"})
    echoed = process.run(["echo", "a program's print\n" + forged]).output
    os.write(1, f"{echoed}\n".encode())
    ctypes.CDLL(None).printf(b"a print of C\n")
    return {"words": wish.words}


def hurry(wish: Wish) -> dict[str, Any]:
    for step in range(wish.steps + 1):
        report.advance("hurry", step, wish.steps)
    return {}


def fail(_: Wish) -> dict[str, Any]:
    problems = [Problem("first", "a", "f.txt", 3), Problem("second")]
    raise CheckError("two are wrong", hint="mend them", problems=problems)


def divide(_: Wish) -> dict[str, Any]:
    return {"never": 1 // 0}


def lack(_: Wish) -> dict[str, Any]:
    return dict(vars(importlib.import_module("no_such_stack")))


def hoard(_: Wish) -> dict[str, Any]:
    raise MemoryError


def die(wish: Wish) -> dict[str, Any]:
    if wish.how == "cut off":
        os.write(_protocol(), b'{"event": "text", "ki')
    if wish.how == "killed for memory":
        Path(wish.name).write_text("oom 1\noom_kill 8\n", encoding="utf-8")
    if wish.how in ("killed", "cut off", "killed for memory"):
        os.kill(os.getpid(), signal.SIGKILL)
    if wish.how == "asserted":
        os.write(2, b"/src/llama.cpp/m.cpp:7: GGML_ASSERT(n > 0) failed\n#1 ggml_abort ()\n")
        os.abort()
    if wish.how == "aborted":
        os.abort()
    sys.exit(3)


def part(wish: Wish) -> dict[str, Any]:
    """One of several: the second does as it is told, the others wait for it, or hear that it is gone."""
    rank = os.environ["RANK"]
    report.info(f"rank {rank}")
    if rank == "1":
        if wish.how == "fails":
            time.sleep(0.3)
            raise CheckError("the second's own error")
        if wish.how in ("killed", "heard of"):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if wish.how == "stops":
            raise InterruptedByUserError("the second has stopped")
        return {"rank": rank}
    if wish.how == "stops":
        time.sleep(5)
        report.info("a checkpoint is written")
        raise InterruptedByUserError("stopped at step 7")
    if wish.how == "heard of":
        time.sleep(0.5)
        raise StageError("train failed: RuntimeError: [gloo] Connection closed by peer")
    if wish.how:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    return {"rank": rank}


def _protocol() -> int:
    sink = report._current()
    assert isinstance(sink, worker.ParentSink)
    return sink.stream.fileno()


def _say_pid() -> None:
    report.info(f"pid {os.getpid()}")


def sleep(wish: Wish) -> dict[str, Any]:
    _say_pid()
    time.sleep(wish.seconds)
    return {}


def finish_step(_: Wish) -> dict[str, Any]:
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    _say_pid()
    while not stopping:
        time.sleep(0.02)
    report.info("a checkpoint is written")
    raise InterruptedByUserError("stopped at step 7", hint="go on from there")


def finish_all(_: Wish) -> dict[str, Any]:
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    _say_pid()
    while not stopping:
        time.sleep(0.02)
    return {"done": True}


def ignore(_: Wish) -> dict[str, Any]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _say_pid()
    time.sleep(600)
    return {}


def environment(wish: Wish) -> dict[str, Any]:
    return {name: os.environ.get(name) for name in wish.names}


def find(wish: Wish) -> dict[str, Any]:
    return {"found": importlib.util.find_spec(wish.name) is not None}


@dataclass(frozen=True)
class Order:
    paths: tuple[Path, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Receipt:
    names: tuple[str, ...]
    scale: float
    where: Path


def deliver(order: Order) -> Receipt:
    return Receipt(tuple(path.name for path in order.paths), order.scale, order.paths[0].parent)


@dataclass(frozen=True)
class CountRequest:
    rows: Path
    out: Path


@dataclass(frozen=True)
class Counted:
    words: int


def count_words(request: CountRequest) -> Counted:
    """The task of the toy stage in `test_toy_stage`."""
    words = request.rows.read_text(encoding="utf-8").split()
    (request.out / "words.txt").write_text("\n".join(words), encoding="utf-8")
    return Counted(len(words))


if __name__ == "__main__":
    names = ("speak", "hurry", "fail", "divide", "lack", "hoard", "die", "sleep", "finish_step", "finish_all")
    worker.TASKS = {
        name: f"tests.worker_tasks:{name}"
        for name in (*names, "environment", "find", "ignore", "part", "deliver", "count_words")
    }
    worker.main()
