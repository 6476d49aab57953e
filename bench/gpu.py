"""Training on a GPU: tokens a second of each method, its peak memory against the estimate, and a whole ship.

A Llama of random weights with the shapes of a billion parameters, one epoch of rows of one length a program;
then LoRA by attention, length and checkpointing, as the book's tables 5.2 and 5.3 have it. What the machine
lacks (Liger, FlashAttention, Unsloth, llama.cpp) is not measured, with forge's own reason. `--small`, and
where there is no GPU: a tiny model on the processor, which shows that all of this runs and nothing else.

Not covered: several GPUs; the same loop written with trl (`training.py` has it, on the processor).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import FORGE, BenchmarkError, Outcome, Run, run
from bench.workplace import QUICKSTART, Workplace, random_model
from forge.model.base import resolve
from forge.train.memory import training_device

# Of what was planned and what was measured the larger over the smaller, the process's start left out.
MEMORY_RATIO = 1.10
_STARTS = ("CUDA context", "libraries")
_MISSING_TOOL = "status 3:"
_SENTENCE = "In this sandwich, there is bacon. "


@dataclass(frozen=True)
class Shape:
    """What is trained: the model's size, rows and rows at once, sentences a row; a table's two lengths."""

    model: str
    rows: int
    batch: int
    sentences: int
    lengths: tuple[int, int]


BILLION = Shape("1B", rows=128, batch=8, sentences=60, lengths=(60, 240))
TINY = Shape("tiny", rows=16, batch=4, sentences=4, lengths=(4, 16))
METHODS: Mapping[str, Mapping[str, Any]] = {
    "LoRA, 16 bits": {"method": "lora"},
    "QLoRA": {"method": "qlora"},
    "int8": {"method": "int8"},
    "LoRA, packing": {"method": "lora", "packing": True},
    "LoRA, Liger": {"method": "lora", "liger": True},
    "LoRA, FlashAttention 2": {"method": "lora", "attention": "flash_attention_2"},
    "LoRA, Unsloth": {"method": "lora", "backend": "unsloth"},
}

TABLE = ("eager", "sdpa")


@dataclass(frozen=True)
class Training:
    """One training: how many rows, at once and of how many sentences, and its fields of `train`."""

    name: str
    rows: int
    batch: int
    sentences: int
    settings: Mapping[str, Any]


def trainings(shape: Shape) -> Iterator[Training]:
    """The methods, all on the same rows, and then the table."""
    for name, settings in METHODS.items():
        yield Training(name, shape.rows, shape.batch, shape.sentences, settings)
    for length, sentences in zip(("short", "long"), shape.lengths, strict=True):
        for attention in TABLE:
            for again in (False, True):
                name = f"{attention}, {length}{', checkpointing' if again else ''}"
                own = {"method": "lora", "attention": attention, "gradient_checkpointing": again}
                yield Training(name, 2, 1, sentences, own)


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Everything once; `pairs` has no say here."""
    has_gpu = training_device("auto").kind == "cuda" and not place.small
    shape, device = (BILLION, "cuda") if has_gpu else (TINY, "cpu")
    base = random_model(place, shape.model, resolve("builtin:tiny").directory)[0] / "base"
    lengths: dict[int, int] = {}
    for number, training in enumerate(trainings(shape)):
        write_rows(place.directory / f"{number}.jsonl", training.rows, training.sentences)
        own = {"batch_size": training.batch, "device": device, "max_length": 2048, **training.settings}
        recipe = {"name": f"gpu-{number}", "base": str(base), "train": {"epochs": 1, **own}}
        recipe["data"] = {"source": f"{number}.jsonl", "eval": 0}
        path = place.directory / f"{number}.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        try:
            planned = _fields(_forge(place, "plan", str(path)))["memory"]
            trained = _fields(_forge(place, "train", str(path)))
        except BenchmarkError as error:
            yield not_measured(training.name, error)
            continue
        # With packing the plan's length is that of several rows together.
        tokens = training.rows * lengths.setdefault(training.sentences, planned["length"])
        yield from outcomes(training.name, tokens, planned["breakdown"], trained, has_gpu=has_gpu)
    yield _ship(place, has_gpu=has_gpu)


def _ship(place: Workplace, *, has_gpu: bool) -> Outcome:
    """The quickstart from nothing; without a GPU, where `bench ship` measures it, only that it begins."""
    name = "ship of the quickstart"
    try:
        shipped = _forge(place, "ship", str(QUICKSTART), *(() if has_gpu else ("--until", "data")))
    except BenchmarkError as error:
        return not_measured(name, error)
    return Outcome(name, shipped.seconds, "s", note="" if has_gpu else "its data alone")


def outcomes(
    name: str, tokens: int, planned: Mapping[str, int], trained: Mapping[str, Any], *, has_gpu: bool
) -> Iterator[Outcome]:
    """The speed of a training, and how far its memory is from what was planned (held to a limit on a GPU)."""
    seconds, peak = trained["seconds"], trained["peak_memory_bytes"]
    note = f"{tokens} tokens in {seconds:.1f} s, computing in {trained['compute']}"
    yield Outcome(f"{name}: tokens a second", tokens / seconds, "", note=note)
    grown = sum(count for part, count in planned.items() if part not in _STARTS)
    # torch's allocator counts tensors alone; the peak of a process has its libraries in it.
    measured = peak if has_gpu else peak - planned["libraries"]
    ratio = max(grown / measured, measured / grown) if measured > 0 else None
    note = f"planned {grown / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"
    yield Outcome(f"{name}: memory", ratio, "x", MEMORY_RATIO if has_gpu else None, note=note)


def not_measured(name: str, error: BenchmarkError) -> Outcome:
    """What a machine lacks is no failure; raises `error` again where it is one."""
    lines = str(error).splitlines()
    if not lines[0].startswith(_MISSING_TOOL):
        raise error
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return Outcome(name, None, "", note=reason)


def write_rows(path: Path, count: int, sentences: int) -> None:
    """Rows of one length whose answers are `sentences` sentences; no two are the same."""
    rows = ({"prompt": f"{number} ?", "completion": _SENTENCE * sentences} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _forge(place: Workplace, *arguments: str) -> Run:
    return run([FORGE, *arguments, "--json"], directory=place.directory, environment=place.environment)


def _fields(done: Run) -> Any:
    return json.loads(done.output.splitlines()[-1])
