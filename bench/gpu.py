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


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Everything once; `pairs` has no say here."""
    has_gpu = training_device("auto").kind == "cuda" and not place.small
    shape, device = (BILLION, "cuda") if has_gpu else (TINY, "cpu")
    base = random_model(place, shape.model, resolve("builtin:tiny").directory)[0] / "base"
    plan: dict[str, tuple[int, int, int, Mapping[str, Any]]] = {
        name: (shape.rows, shape.batch, shape.sentences, settings) for name, settings in METHODS.items()
    }
    for sentences in shape.lengths:
        for attention in TABLE:
            for again in (False, True):
                name = f"{attention}, {'long' if sentences == shape.lengths[1] else 'short'}"
                own = {"method": "lora", "attention": attention, "gradient_checkpointing": again}
                plan[name + (", checkpointing" if again else "")] = (2, 1, sentences, own)
    lengths: dict[int, int] = {}
    for number, (name, (rows, batch, sentences, settings)) in enumerate(plan.items()):
        recipe = place.directory / f"{number}.yaml"
        write_rows(place.directory / f"{number}.jsonl", rows, sentences)
        train = {"epochs": 1, "batch_size": batch, "device": device, "max_length": 2048, **settings}
        data = {"source": f"{number}.jsonl", "eval": 0}
        recipe.write_text(
            json.dumps({"name": f"gpu-{number}", "base": str(base), "data": data, "train": train})
        )
        try:
            planned = _fields(_forge(place, "plan", str(recipe)))["memory"]
            trained = _fields(_forge(place, "train", str(recipe)))
        except BenchmarkError as error:
            yield not_measured(name, error)
            continue
        # With packing the plan's is that of several rows together.
        tokens = rows * lengths.setdefault(sentences, planned["length"])
        yield from outcomes(name, tokens, planned["breakdown"], trained, has_gpu=has_gpu)
    ship = (str(QUICKSTART), *(() if has_gpu else ("--until", "data")))
    try:
        shipped = _forge(place, "ship", *ship)
    except BenchmarkError as error:
        yield not_measured("ship of the quickstart", error)
    else:
        yield Outcome(
            "ship of the quickstart", shipped.seconds, "s", note="" if has_gpu else "its data alone"
        )


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
