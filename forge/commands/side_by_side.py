"""The runs of a sweep in processes of their own, one on each GPU at a time.

What two of them have in common is made by the one that comes first; the other waits for it (`store.lock`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread

from forge import report
from forge.errors import ForgeError, MissingToolError, RecipeError, StageError, error_from_json
from forge.process import Child
from forge.recipe.sweep import Combination
from forge.train.ranks import gpu_count, only, only_these

Shipped = Generator[tuple[int, ForgeError | None], None, None]
"""The runs by their numbers, as they end, with what they raised."""


@dataclass
class _Running:
    """A run in its process: its place among all, its GPU, and the last line that it wrote."""

    number: int
    gpu: int
    child: Child
    last: str = ""
    ended: SimpleQueue[_Running] = field(default_factory=SimpleQueue)

    def read(self) -> None:
        """Read until the process ends."""
        for line in self.child.lines():
            self.last = line
        self.ended.put(self)

    def failure(self) -> ForgeError | None:
        """What the run raised, None of one that went well."""
        status = self.child.wait()
        if status == 0:
            return None
        try:
            return error_from_json(json.loads(self.last)["error"])
        except (ValueError, KeyError, TypeError):
            return StageError(f"its process ended with status {status}", hint="read the run's log.txt")


def gpus_named(text: str) -> tuple[int, ...]:
    """The GPUs of `--devices`: `auto` for all, or numbers with commas between.

    Raises `RecipeError` for what is neither, `MissingToolError` for GPUs that are not there.
    """
    there = gpu_count()
    numbers = [str(number) for number in range(there)] if text == "auto" else text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise RecipeError(f"--devices {text}: no numbers of GPUs", hint="such as 0,1, or auto for all")
    gpus = tuple(dict.fromkeys(map(int, numbers)))
    absent = [gpu for gpu in gpus if gpu >= there]
    if absent or not gpus:
        named = ", ".join(map(str, absent)) or "at all"
        raise MissingToolError(
            f"--devices: there is no GPU {named} here{only(there)}",
            hint="leave it out: the runs then go one after another",
        )
    return gpus


def ship_side_by_side(combinations: Sequence[Combination], gpus: Sequence[int], until: str | None) -> Shipped:
    """Ship each; yields its number and what it raised, as they end. Closing it stops those that run."""
    waiting, free = list(enumerate(combinations)), list(gpus)
    ended: SimpleQueue[_Running] = SimpleQueue()
    with ExitStack() as stack:
        left = len(combinations)
        while left:
            while waiting and free:
                (number, combination), gpu = waiting.pop(0), free.pop(0)
                command = [sys.executable, "-m", "forge", "ship", str(combination.loaded.path), "--json"]
                command += [part for override in combination.overrides for part in ("-o", override)]
                command += ["--until", until] if until else []
                child = stack.enter_context(
                    Child(command, environment=only_these((gpu,)), separate_errors=True)
                )
                running = _Running(number, gpu, child, ended=ended)
                Thread(target=running.read, daemon=True).start()
                report.info(f"run {number + 1} of {len(combinations)} on GPU {gpu}: {combination.name}")
            done = ended.get()
            free.append(done.gpu)
            left -= 1
            failure = done.failure()
            done.child.stop()
            yield done.number, failure
