"""What is watched while training runs: progress, numbers that make no sense, the wish to stop.

Runs in a worker. The class is made in a function because its parent comes from transformers.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from forge import report
from forge.errors import StageError
from forge.model.memory import peak_memory
from forge.train.checkpoints import seal
from forge.train.live import LivePage
from forge.train.log import Evaluation, Step, append, in_words, keep_until
from forge.train.questions import LiveQuestions
from forge.train.ranks import agreed

PROGRESS = "train"
_TRY = (
    "lower train.learning_rate, or warm up for longer (train.warmup_fraction); "
    "with float16 set train.dtype: fp32"
)
_SMOOTHING = 0.9
# trl's names of `Evaluation.accuracy` and `margin`.
_REWARDS = ("eval_rewards/accuracies", "eval_rewards/margins")
# A loss this many nats above that of a guess among all tokens, so many steps in a row, has exploded.
_ABOVE_GUESSING, _EXPLODED_STEPS = 3.0, 3


class Best:
    """The evaluations so far, and the weights of the best one, in files that a resumed run finds again."""

    def __init__(self, directory: Path, patience: int | None) -> None:
        self._directory, self._patience = directory, patience
        self._log = directory / "evaluations.jsonl"
        self.evaluations: list[Evaluation] = []

    @property
    def step(self) -> int | None:
        """Of the lowest held-out loss, the first of equals."""
        best = min(self.evaluations, key=lambda evaluation: evaluation.loss, default=None)
        return None if best is None else best.step

    @property
    def last_in_words(self) -> str:
        last = self.evaluations[-1]
        return in_words(last) + ("" if self.step == last.step else f" (best: step {self.step})")

    @property
    def is_patience_spent(self) -> bool:
        since = [evaluation for evaluation in self.evaluations if evaluation.step > (self.step or 0)]
        return self._patience is not None and len(since) >= self._patience

    def go_on_from(self, step: int) -> None:
        """A resumed run repeats what came after its checkpoint."""
        self.evaluations = keep_until(self._log, step, Evaluation)

    def add(self, evaluation: Evaluation, model: Any) -> bool:
        """Note an evaluation; whether it is the best. Its weights are kept, and those of the best before."""
        self.evaluations.append(evaluation)
        append(self._log, evaluation)
        step = evaluation.step
        if self.step != step:
            return False
        from safetensors.torch import save_file

        save_file({name: weight.detach().cpu().clone() for name, weight in _trained(model)}, self._file(step))
        kept = sorted(self._directory.glob("best-*"), key=lambda path: int(path.stem.rpartition("-")[2]))
        for path in kept[:-2]:
            path.unlink()
        return True

    def restore(self, model: Any) -> int | None:
        """Put the best weights back; returns their step, or None where nothing was evaluated."""
        step = self.step
        if step is None:
            return None
        from safetensors.torch import load_file

        weights = load_file(self._file(step))
        for name, parameter in _trained(model):
            parameter.data.copy_(weights[name])
        return step

    def _file(self, step: int) -> Path:
        return self._directory / f"best-{step}.safetensors"


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def watcher(
    log: Path, checkpoint_seconds: float, best: Best, asked: LiveQuestions, *, vocabulary: int, page: LivePage
) -> Any:
    """A `TrainerCallback`: log lines to `log`, a checkpoint every so often, at each best and on SIGTERM."""
    import transformers

    class Watcher(transformers.TrainerCallback):  # type: ignore[misc]
        is_asked = stopping = False  # this process was asked to stop; all have agreed to

        def __init__(self) -> None:
            self.log, self.best, self.asked = log, best, asked
            self.saved = time.monotonic()
            self.losses = Losses(vocabulary)
            self.pace = _Pace()
            self.seconds = 0.0
            self.rewards: dict[str, float] = {}

        @property
        def is_patience_spent(self) -> bool:
            return best.is_patience_spent

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            best.go_on_from(state.global_step)
            asked.begin(state.global_step, model)
            page.begin(state, keep_until(log, state.global_step, Step), best.evaluations)
            self.began = time.monotonic()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = round(time.monotonic() - self.began, 2)
            page.end(state, best.evaluations)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            is_late = time.monotonic() - self.saved > checkpoint_seconds
            self.stopping, is_late = agreed(args.device, self.is_asked, is_late)
            control.should_save |= self.stopping or is_late
            control.should_training_stop |= self.stopping  # the last step sets it too
            if not self.stopping and args.eval_steps and state.global_step >= state.max_steps:
                control.should_evaluate = True

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], model: Any, **_: Any
        ) -> None:
            evaluation = Evaluation(
                state.global_step, round(metrics["eval_loss"], 6), *map(self.rewards.get, _REWARDS)
            )
            refuse_not_finite(evaluation.step, evaluation.loss, None)
            if best.add(evaluation, model):
                control.should_save = True
            report.info(f"train: step {evaluation.step}: {best.last_in_words}")
            asked.ask(state.global_step, model)
            if best.is_patience_spent:
                report.info(f"train: no better since step {best.step}: stopping early")
                control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self.saved = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                # What trl has measured beside the held-out loss, just before `on_evaluate`.
                self.rewards = {name: logs[name] for name in _REWARDS if name in (logs or {})}
                return
            refuse_not_finite(state.global_step, loss, logs.get("grad_norm"))
            self.losses.add(state.global_step, loss)
            step = _step(state, loss, logs)
            append(log, step)
            note = f"loss {self.losses.smoothed:.4f}, rate {step.learning_rate or 0:.2g}"
            note += self.pace.note(logs.get("num_tokens"))
            page.add(state, step, best.evaluations, note)
            report.advance(PROGRESS, state.global_step, state.max_steps, note)

    made = Watcher()

    def stop(number: int, frame: object) -> None:
        made.is_asked = True

    signal.signal(signal.SIGTERM, stop)
    return made


def _step(state: Any, loss: float, logs: Mapping[str, Any]) -> Step:
    rate, norm = logs.get("learning_rate"), logs.get("grad_norm")
    return Step(state.global_step, round(state.epoch, 4), loss, rate, norm, round(time.time(), 3))


class Losses:
    """The loss smoothed, and whether it has exploded."""

    def __init__(self, vocabulary: int) -> None:
        self._limit = math.log(max(vocabulary, 2)) + _ABOVE_GUESSING
        self._sum, self._weight, self._above, self._first = 0.0, 0.0, 0, 0.0

    @property
    def smoothed(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def add(self, step: int, loss: float) -> None:
        """Raise `StageError` when the loss stays far above where it began and above that of guessing."""
        self._first = self._first if self._weight else loss
        self._sum = _SMOOTHING * self._sum + (1 - _SMOOTHING) * loss
        self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        self._above = self._above + 1 if loss > max(self._limit, 2 * self._first) else 0
        if self._above >= _EXPLODED_STEPS:
            raise StageError(
                f"train: step {step}: loss {loss:.4g}, {self._first:.4g} at the start: it has exploded",
                hint=_TRY,
            )


class _Pace:
    """Tokens a second over the last steps, and memory in use."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque(maxlen=20)

    def note(self, tokens: float | None) -> str:
        parts = []
        if tokens is not None:
            self._marks.append((time.monotonic(), tokens))
            (began, first), (now, last) = self._marks[0], self._marks[-1]
            if now > began:
                parts.append(f"{(last - first) / (now - began):.0f} tokens/s")
        parts.append(f"{_memory() / 1e9:.1f} GB")
        return ", " + ", ".join(parts)


def _memory() -> int:
    """Bytes in use: the GPU's at their peak, else this process's."""
    return _gpu_bytes() or int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most that was in use at any moment: of the GPU, else of this process."""
    return _gpu_bytes() or peak_memory()


def _gpu_bytes() -> int:
    """The most that was taken of the GPU; 0 where nothing was."""
    import torch

    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else 0


def refuse_not_finite(step: int, loss: float, norm: float | None) -> None:
    """Raise `StageError` at the first loss or gradient that is not a number (pitfall 26)."""
    if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
        raise StageError(
            f"train: step {step}: loss {loss}, gradient norm {norm}: the training has diverged", hint=_TRY
        )
