"""The logs of a training run: a JSON object a line, appended as it goes, read again by a run that goes on."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from forge.codec import from_plain, to_plain

LOG_FILE = "logs/training.jsonl"


@dataclass(frozen=True)
class Step:
    """A step of training; `time` is in seconds since 1970."""

    step: int
    epoch: float
    loss: float
    learning_rate: float | None = None
    gradient_norm: float | None = None
    time: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The held-out loss after a step, in nats a token; of preferences it is the trainer's own loss.

    Of these there are trl's rewards too: the share of pairs whose chosen answer has the larger one (None of
    single answers), and by how much the good ones have it on average.
    """

    step: int
    loss: float
    accuracy: float | None = None
    margin: float | None = None


def in_words(evaluation: Evaluation) -> str:
    """What a person is shown of it."""
    if evaluation.margin is None:
        perplexity = math.exp(min(evaluation.loss, 50))
        return f"held-out loss {evaluation.loss:.4f}, perplexity {perplexity:.4g}"
    if evaluation.accuracy is None:
        margin = f"good ones above bad ones by {evaluation.margin:.3g}"
        return f"held-out answers: loss {evaluation.loss:.4f}, {margin}"
    return (
        f"held-out pairs: loss {evaluation.loss:.4f}, chosen answer preferred in "
        f"{evaluation.accuracy:.0%}, margin {evaluation.margin:.3g}"
    )


@dataclass(frozen=True)
class Answers:
    """What the model answered to each of the recipe's questions after a step; step 0 is before training."""

    step: int
    texts: tuple[str, ...]


Entry = TypeVar("Entry", Step, Evaluation, Answers)


def read_log(path: Path, kind: type[Entry]) -> list[Entry]:
    """The whole lines of a log; one that was cut off or damaged is left out, and no file is no lines."""
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            entries.append(from_plain(kind, json.loads(line), is_strict=False))
    return entries


def append(path: Path, entry: Step | Evaluation | Answers) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(_line(entry))


def keep_until(path: Path, step: int, kind: type[Entry]) -> list[Entry]:
    """Forget what came after `step`, which a resumed run repeats; returns what is kept."""
    kept = [entry for entry in read_log(path, kind) if entry.step <= step]
    path.write_text("".join(map(_line, kept)), encoding="utf-8")
    return kept


def _line(entry: Step | Evaluation | Answers) -> str:
    return json.dumps(to_plain(entry)) + "\n"
