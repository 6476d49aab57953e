"""What is watched while training runs: progress, numbers that are not finite, the wish to stop.

Runs in a worker. The class is made in a function because its parent comes from transformers.
"""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

from forge import report
from forge.errors import StageError

MARKER = "complete"
PROGRESS = "train"


def watcher(log: Path, checkpoint_seconds: float) -> Any:
    """A `TrainerCallback`: log lines to `log`, a checkpoint every so often and on SIGTERM."""
    import transformers

    class Watcher(transformers.TrainerCallback):  # type: ignore[misc]
        stopping = False

        def __init__(self) -> None:
            self.saved = time.monotonic()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _forget_later_steps(log, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.stopping or time.monotonic() - self.saved > checkpoint_seconds:
                control.should_save = True
            if self.stopping:  # left alone otherwise: the last step sets it too
                control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Written last: a checkpoint without it was cut off and does not count.
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARKER).touch()
            self.saved = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            refuse_not_finite(state.global_step, loss, logs.get("grad_norm"))
            line = {
                "step": state.global_step,
                "epoch": round(state.epoch, 4),
                "loss": loss,
                "learning_rate": logs.get("learning_rate"),
                "gradient_norm": logs.get("grad_norm"),
                "time": round(time.time(), 3),
            }
            with log.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            report.advance(PROGRESS, state.global_step, state.max_steps, f"loss {loss:.4f}")

    made = Watcher()

    def stop(number: int, frame: object) -> None:
        made.stopping = True

    signal.signal(signal.SIGTERM, stop)
    return made


def _forget_later_steps(log: Path, step: int) -> None:
    """A resumed run repeats what came after its checkpoint."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in kept))


def refuse_not_finite(step: int, loss: float, norm: float | None) -> None:
    """Raise `StageError` at the first loss or gradient that is not a number (pitfall 26)."""
    if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
        raise StageError(
            f"train: step {step}: loss {loss}, gradient norm {norm}: the training has diverged",
            hint="lower train.learning_rate; with float16 set train.dtype: fp32",
        )


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint whose marker is there."""
    found = [path for path in directory.glob("checkpoint-*") if (path / MARKER).exists()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
