"""What a training run is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forge.recipe.training import Train
from forge.train.arithmetic import Arithmetic
from forge.train.log import Answers, Evaluation
from forge.train.model import BaseSettings
from forge.train.questions import Question
from forge.train.speed import Choice


@dataclass(frozen=True)
class TrainRequest:
    """An adapter of `base`, trained on the prepared rows in `data` and saved in `out`.

    `batch_size` and `max_length` are numbers here whatever the recipe's section leaves open; `rows` is how
    many the embedding gets where tokens are added; `trackers` is where the trackers leave their files, `page`
    the report that shows the run while it trains. `questions` are asked before training and at each
    evaluation.
    """

    base: Path
    base_name: str
    base_revision: str | None
    tokenizer: Path
    pad_token: str
    data: Path
    out: Path
    settings: Train
    batch_size: int
    max_length: int
    trackers: Path
    continue_from: Path | None = None
    rows: int | None = None
    page: Path | None = None
    trust_remote_code: bool = False
    questions: tuple[Question, ...] = ()

    @property
    def loading(self) -> BaseSettings:
        return BaseSettings.of(self.settings, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Trained:
    """What was done: `modules` counts the adapted ones by short name, `best_step` is that of the weights that
    were kept, `resumed_from` the checkpoint that a stopped run left; such a run has no `seconds` of its own.
    `batch_size` is how many rows each of the `processes` held at once, `choices` what `auto` meant of what
    makes it faster.
    """

    steps: int
    epochs: float
    mean_loss: float
    trainable_parameters: int
    total_parameters: int
    modules: Mapping[str, int]
    method: str
    device: str
    compute: str
    arithmetic: Arithmetic
    attention: str
    threads: int
    processor: str
    evaluations: tuple[Evaluation, ...]
    best_step: int | None
    stopped_early: bool
    resumed_from: str | None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    questions: tuple[str, ...] = ()
    answers: tuple[Answers, ...] = ()
    batch_size: int | None = None
    choices: tuple[Choice, ...] = ()
    processes: int = 1
