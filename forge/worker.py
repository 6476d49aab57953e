"""The one protocol and edge for whatever needs torch, transformers or llama.cpp's libraries.

`call` starts `python -m forge.worker`, writes one JSON line (the task and its arguments) and reads
JSON lines back: what `report` says, then one result or one error. The library's own prints, on
standard output or error, end in the log, never in the protocol. A task takes one dataclass and gives one
back, and large things are passed as paths. `perform` sends and reads them through `codec`: a misspelt field
is a type error here and refused there.

A worker that is asked to stop (SIGTERM) raises KeyboardInterrupt in its task, unless the task
handles the signal itself, as training does.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar, get_type_hints

from forge import process, report
from forge.codec import from_plain, to_plain
from forge.errors import (
    ForgeError,
    InterruptedByUserError,
    MissingToolError,
    OutOfMemoryError,
    StageError,
    error_from_json,
)

# The whole of what a worker may run: task name -> module:function.
TASKS: Mapping[str, str] = {
    "make_smollm2": "forge.model.smollm2:make_smollm2",
    "rehearse": "forge.export.rehearsal:rehearse_export",
    "train": "forge.train.run:train",
    "validate": "forge.adapter.status:validate_adapter",
    "combine": "forge.adapter.combine:combine",
    "hold": "forge.adapter.several:hold",
    "evaluate": "forge.train.evaluate:evaluate",
    "calibrate": "forge.verify.calibrate:calibrate",
    "export": "forge.export.run:export_gguf",
    "merge": "forge.export.checkpoint:merge",
    "requantize": "forge.export.requantize:requantize",
    "repair": "forge.export.repair:repair",
    "verify": "forge.verify.measure:measure",
    "choose_base": "forge.verify.bases:choose_base",
    "count": "forge.verify.vocabulary:count",
    "machine": "forge.train.machine:look",
}

Request = TypeVar("Request")
Answer = TypeVar("Answer")

COMMAND: Sequence[str] = (sys.executable, "-m", "forge.worker")
# How long a task may take to stop when it is asked to. Training finishes its step and a checkpoint.
_GRACE_SECONDS: Mapping[str, float] = {"train": 600.0}
_LAST_LINES = 20
# How long the others of a team have to say what ended it: who loses a partner hears of it at once.
_OTHERS_SECONDS = 3.0
# What a worker says that lost another one.
_LOST = re.compile(r"gloo|nccl|peer|TCPStore|Broken pipe|Dist\w*Error|rendezvous", re.IGNORECASE)


def perform(
    task: Callable[[Request], Answer],
    request: Request,
    *,
    log: Path | None = None,
    together: Sequence[Mapping[str, str]] = ({},),
) -> Answer:
    """Run `task`, one of `TASKS`, in a worker process on `request`, a dataclass; its result is one, too.

    `together` and what is raised are as for `call`.
    """
    where = f"{task.__module__}:{task.__qualname__}"
    [name] = [name for name, function in TASKS.items() if function == where]
    answer: type[Answer] = get_type_hints(task)["return"]
    return from_plain(answer, call(name, to_plain(request), log=log, together=together))


def call(
    task: str,
    arguments: Mapping[str, object],
    *,
    log: Path | None = None,
    together: Sequence[Mapping[str, str]] = ({},),
) -> Mapping[str, Any]:
    """Run the task of that name on its request as plain JSON, and return its result as such.

    `together` has the environment of each of several workers that do it as one: what the first says is shown
    and its result returned, and the first that fails ends them all. Raises the `ForgeError` that the task
    raised; `StageError` when a worker died without a word, `OutOfMemoryError` when the system killed it for
    memory; `InterruptedByUserError` or KeyboardInterrupt when it was stopped. What the workers printed is in
    `log`; without one its last lines are shown with `-v` when it fails.
    """
    always = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with _log(log) as stream, contextlib.ExitStack() as stack:
        where = f"see the end of {log}" if log else "-v shows its last lines"
        team = _Team(task, stream, where)
        for environment in together:
            child = process.Child(
                COMMAND, log=stream, environment=always | {**environment}, separate_errors=True
            )
            team.children.append(stack.enter_context(child))
            child.send(json.dumps({"task": task, "arguments": dict(arguments)}) + "\n")
        try:
            return team.outcome()
        except KeyboardInterrupt:
            team.stop()
            raise
        except (StageError, MissingToolError):
            if log is None:
                stream.seek(0)
                report.detail("".join(stream.readlines()[-_LAST_LINES:]).rstrip())
            raise


def _log(path: Path | None) -> IO[str]:
    if path is not None:
        return path.open("a+", encoding="utf-8", errors="backslashreplace")
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


class _Team:
    """The workers of one task, most often one: the first is listened to, the others are watched."""

    def __init__(self, task: str, log: IO[str], where: str) -> None:
        self.children: list[process.Child] = []
        self._task, self._log, self._where = task, log, where
        self._kills = process.kills_for_memory()
        self._failures: list[tuple[int, ForgeError]] = []
        self._watched: list[threading.Thread] = []
        self._ended_first = False

    def outcome(self) -> Mapping[str, Any]:
        """Read the first one's messages to the end, and let all exit by themselves."""
        for number in range(1, len(self.children)):
            thread = threading.Thread(target=self._watch, args=(number,), daemon=True)
            thread.start()
            self._watched.append(thread)
        try:
            value = self._result(0, _receive)
            self._wait(process.GRACE_SECONDS)
            if not self._failures:
                return value
        except ForgeError as failure:
            if len(self.children) == 1:
                raise
            self._wait(_OTHERS_SECONDS)
            if not self._ended_first:
                self._failures.insert(0, (0, failure))
        number, cause = next(
            (entry for entry in self._failures if not _LOST.search(entry[1].message)), self._failures[0]
        )
        for child in self.children:
            child.kill()
        cause.message += f" (process {number + 1} of {len(self.children)})"
        cause.args = (cause.message,)
        raise cause from None

    def _result(self, number: int, receive: Callable[[str], Mapping[str, Any] | None]) -> Mapping[str, Any]:
        child = self.children[number]
        for line in child.lines():
            try:
                outcome = receive(line)
            except StageError as failure:
                failure.hint = failure.hint or self._where
                raise
            if outcome is not None:
                child.ends_within(process.GRACE_SECONDS)
                return outcome
        raise self._death(child.wait())

    def _watch(self, number: int) -> None:
        """Of another than the first only its end is heard; when it fails, so does the first."""
        try:
            self._result(number, _receive_end)
        except InterruptedByUserError as stopped:  # as all were asked to; the first may have work to finish
            self._failures.append((number, stopped))
        except ForgeError as failure:
            self._failures.append((number, failure))
            first = self.children[0]
            if not first.ends_within(_OTHERS_SECONDS):
                self._ended_first = True
                first.kill()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for thread in self._watched:
            thread.join(max(until - time.monotonic(), 0))

    def _death(self, status: int) -> StageError:
        reason = ""
        if status == -signal.SIGKILL:
            if self._kills is not None and (process.kills_for_memory() or 0) > self._kills:
                return OutOfMemoryError(
                    f"{self._task}: this machine ran out of memory, and the system killed the worker",
                    hint="free some, or use a smaller batch or model",
                )
            reason = "; killed from outside, or by the system for lack of memory"
        elif status == -signal.SIGABRT and (assertion := _assertion(self._log)):
            reason = f"; llama.cpp gave up: {assertion}"
        return StageError(
            f"{self._task}: the worker process ended with status {status} and said nothing{reason}",
            hint=self._where,
        )

    def stop(self) -> None:
        """Ask the workers to stop and read what is reported; a second Ctrl-C, or too long a time, kills."""
        report.close()
        report.info(f"stopping {self._task}: it finishes what it must (Ctrl-C again kills it)")
        killer = threading.Timer(_GRACE_SECONDS.get(self._task, process.GRACE_SECONDS), self._kill)
        killer.daemon = True
        killer.start()
        try:
            for child in self.children:
                child.terminate()
            for line in self.children[0].lines():
                _receive(line)
        except KeyboardInterrupt:
            self._kill()
            raise
        finally:
            killer.cancel()

    def _kill(self) -> None:
        for child in self.children:
            child.kill()


def _assertion(log: IO[str]) -> str:
    """The condition of llama.cpp that did not hold and so ended the process; empty where there is none."""
    log.seek(0)
    failed = [line.strip().rpartition("/")[2] for line in log if "GGML_ASSERT" in line]
    return failed[-1] if failed else ""


def _receive(line: str) -> Mapping[str, Any] | None:
    try:
        message: Mapping[str, Any] = json.loads(line)
    except ValueError:
        return None  # cut off: the worker was killed while it spoke
    match message["event"]:
        case "text":
            report.say(message["kind"], message["text"])
        case "table":
            report.table(message["title"], message["columns"], message["rows"])
        case "advance":
            report.advance(message["label"], message["done"], message["total"], message["note"])
        case "error":
            raise error_from_json(message["error"], is_of_memory=message["is_of_memory"])
        case "result":
            value: Mapping[str, Any] = message["value"]
            return value
    return None


def _receive_end(line: str) -> Mapping[str, Any] | None:
    """As `_receive`, of a worker whose words are not shown."""
    return _receive(line) if line.startswith(('{"event": "result"', '{"event": "error"')) else None


class ParentSink:
    """In the worker: what is said travels to the parent."""

    seconds_between = 0.1

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self._last = 0.0

    def send(self, event: str, **fields: object) -> None:
        self.stream.write(json.dumps({"event": event, **fields}) + "\n")
        self.stream.flush()

    def text(self, kind: str, text: str) -> None:
        self.send("text", kind=kind, text=text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[report.Cell]]) -> None:
        self.send("table", title=title, columns=list(columns), rows=[list(row) for row in rows])

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        if 0 < done < total and now - self._last < self.seconds_between:
            return
        self._last = now
        self.send("advance", label=label, done=done, total=total, note=note)


def main() -> None:
    """The worker's side: read a request, run it, answer once."""
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sink = ParentSink(protocol)
    report.configure(sink=sink, verbose=True)
    request = json.loads(sys.stdin.readline())
    process.exit_with_parent(sys.stdin)
    # bitsandbytes fetches a kernel of a hub with this package, and runs it; None: it cannot be imported.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    status = _answer(request, sink)
    _leave(status, protocol)


def _leave(status: int, protocol: IO[str]) -> NoReturn:
    """End with what is registered done and every stream written, C's too.

    Taking torch apart object by object, as the interpreter does, would take another second.
    """
    atexit._run_exitfuncs()
    for stream in (protocol, sys.stdout, sys.stderr):
        stream.flush()
    ctypes.CDLL(None).fflush(None)
    os._exit(status)


def _answer(request: Mapping[str, Any], sink: ParentSink) -> int:
    """The worker's edge: the one place where its exceptions are turned into messages."""
    module, _, function = TASKS[request["task"]].partition(":")
    try:
        with process.signals_as_interrupt():
            value = _perform(getattr(importlib.import_module(module), function), request["arguments"])
        sink.send("result", value=to_plain(value))
        return 0
    except KeyboardInterrupt:
        failure: ForgeError = InterruptedByUserError(
            f"{request['task']} was interrupted", hint="run the same command again to go on"
        )
    except ForgeError as known:
        failure = known
    except ModuleNotFoundError as missing:
        failure = MissingToolError(
            f"the Python package {missing.name} is not installed",
            hint="install the training stack: pip install 'forge-ship[train]'",
        )
        traceback.print_exc()
    except MemoryError:
        failure = OutOfMemoryError(f"{request['task']}: out of memory", hint="use a smaller batch or model")
    except Exception as bug:  # noqa: BLE001 - the worker's edge
        traceback.print_exc()
        failure = StageError(f"{request['task']} failed: {type(bug).__name__}: {bug}")
    sink.send("error", error=failure.as_json(), is_of_memory=isinstance(failure, OutOfMemoryError))
    return failure.code


def _perform(task: Callable[..., object], arguments: Mapping[str, object]) -> object:
    [kind] = [kind for name, kind in get_type_hints(task).items() if name != "return"]
    return task(from_plain(kind, arguments))


if __name__ == "__main__":
    main()
