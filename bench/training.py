"""What forge's training costs over the same loop written directly with trl.

Both are whole programs, measured from their start to their end, imports and loading included: that
is what a person waits for. Both train the built-in base by QLoRA on the same token ids with the
same figures (those of `plain_trl.py`), and the benchmark fails when their losses differ. The loop
alone, from the end of the first step to the end of the last, is told beside it.

Not covered: GPUs, more than one process, and the data stage, which is cached before the first pair.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import plain_trl
from bench.measure import FORGE, BenchmarkError, Outcome, Run, interleaved, median_ratio, run
from bench.workplace import Workplace
from forge.model.base import resolve

RATIO = 1.05
BASE = "builtin:tiny"
RECIPE = f"""\
name: training
base: {BASE}
data:
  source: builtin:yoda
  columns: {{prompt: sentence, completion: translation_extra}}
  eval: builtin:yoda_heldout
train:
  method: qlora
  device: cpu
  dtype: fp32
  max_steps: {plain_trl.STEPS}
  learning_rate: {plain_trl.LEARNING_RATE}
  schedule: cosine
  warmup_fraction: {plain_trl.WARMUP}
  batch_size: {plain_trl.BATCH_SIZE}
  seed: {plain_trl.SEED}
  lora: {{r: {plain_trl.RANK}, alpha: {plain_trl.ALPHA}, dropout: 0.0, targets: all-linear}}
deploy: {{runtime: none}}
"""
# Same rows, order, seed and number types give the same losses to seven digits. Adapters in bfloat16
# on one side, which makes that side a quarter slower, show as 1e-3 (after 30 steps).
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Trained:
    """One training: the program, the mean loss of its steps, and the seconds of its loop."""

    program: Run
    loss: float
    loop: float


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """The median ratios of `pairs` pairs; raises `BenchmarkError` when the two did not do the same."""
    recipe = place.directory / "training.yaml"
    recipe.write_text(RECIPE)
    _forge(place, recipe, "--until", "data")
    # Read once, so that the first pair does not pay for the disk.
    run([sys.executable, "-c", "import trl, peft, bitsandbytes"], directory=place.directory)
    done = interleaved(pairs, partial(_ours, place, recipe), partial(_usual, place))
    refuse_other_work(done)
    seconds = [(ours.program.seconds, usual.program.seconds) for ours, usual in done]
    yield _ratio("training: whole program", seconds, RATIO, " s")
    yield _ratio("training: loop alone", [(ours.loop, usual.loop) for ours, usual in done], None, " s")
    peaks = [(ours.program.peak_rss_bytes / 1e6, usual.program.peak_rss_bytes / 1e6) for ours, usual in done]
    processor = [(ours.program.cpu_seconds, usual.program.cpu_seconds) for ours, usual in done]
    yield _ratio("training: processor time", processor, None, " s")
    yield _ratio("training: peak memory", peaks, None, " MB")


def refuse_other_work(done: Sequence[tuple[Trained, Trained]]) -> None:
    """Raise `BenchmarkError` when the losses of a pair differ: then its times compare nothing."""
    for ours, usual in done:
        if abs(ours.loss / usual.loss - 1) > LOSS_TOLERANCE:
            raise BenchmarkError(f"the losses differ: forge {ours.loss:.6f}, plain trl {usual.loss:.6f}")


def _ratio(name: str, figures: Sequence[tuple[float, float]], limit: float | None, unit: str) -> Outcome:
    value, samples = median_ratio(figures)
    ours, usual = (statistics.median(column) for column in zip(*figures, strict=True))
    note = f"forge {ours:.1f}{unit}, plain trl {usual:.1f}{unit}, {len(figures)} pairs"
    return Outcome(name, value, "x", limit, samples, note)


def _forge(place: Workplace, recipe: Path, *options: str) -> Run:
    command = [FORGE, "ship", str(recipe), *options]
    return run(command, directory=place.directory, environment=place.environment)


def _ours(place: Workplace, recipe: Path) -> Trained:
    program = _forge(place, recipe, "--until", "train", "--retrain")
    log = _one(place.home, "artifacts/train/*/logs/training.jsonl")
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return Trained(
        program, statistics.fmean(step["loss"] for step in steps), steps[-1]["time"] - steps[0]["time"]
    )


def _usual(place: Workplace) -> Trained:
    rows = _one(place.home, "artifacts/data/*/train.jsonl")
    out = place.directory / "plain"
    command = [sys.executable, plain_trl.__file__, str(resolve(BASE).directory), str(rows), str(out)]
    program = run(command, directory=place.directory, environment=place.environment)
    if not (out / "adapter_model.safetensors").is_file():
        raise BenchmarkError("plain trl saved no adapter")
    said = json.loads(program.output.splitlines()[-1])
    return Trained(program, said["loss"], said["last"] - said["first"])


def _one(directory: Path, pattern: str) -> Path:
    found = list(directory.glob(pattern))
    if len(found) != 1:
        raise BenchmarkError(f"{len(found)} files {pattern} in {directory}, one was expected")
    return found[0]
