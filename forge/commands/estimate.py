"""`forge estimate`: the memory that training and serving take, from headers only."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from forge import report
from forge.data.prepare import prepare
from forge.errors import DataError
from forge.model.config import read_configuration
from forge.model.estimate import inference
from forge.recipe.schema import Train
from forge.resolve.bases import find_base_headers
from forge.resolve.resolved import Resolved
from forge.stages.data import DataStage
from forge.train.memory import (
    PLANNING_LENGTH,
    Memory,
    Setting,
    gpus_that_fit,
    job_of,
    memory_of,
    training_device,
)

_QUANT = "q4_k_m"
_CONTEXT = 4096


def estimate_base(
    base: str,
    *,
    method: Literal["auto", "qlora", "int8", "lora", "full"],
    length: int,
    batch: int,
    rank: int = 16,
    offline: bool = False,
) -> Mapping[str, object]:
    """Of a base by its name; the hub is asked for headers where it is not here."""
    here, tensors = find_base_headers(base, offline=offline)
    assert here.directory is not None
    configuration = read_configuration(here.directory)
    train = Train.model_validate({"method": method, "batch_size": batch, "lora": {"r": rank}})
    device = training_device("auto")
    memory = memory_of(job_of(train, length, device), tensors, configuration, device)
    serving = inference(
        sum(tensor.numel for tensor in tensors.values()),
        configuration,
        quant=_QUANT,
        context=min(configuration.max_positions or _CONTEXT, _CONTEXT),
    )
    return _shown(base, memory, serving.total)


def estimate_recipe(ship: Resolved) -> Mapping[str, object]:
    """Of a recipe that trains; the length is that of its rows, where they were prepared before."""
    memory = memory_of_ship(ship)
    serving = inference(ship.parameters, ship.configuration, quant=_QUANT, context=_CONTEXT)
    return _shown(ship.recipe.name, memory, serving.total)


def memory_of_ship(ship: Resolved) -> Memory:
    """The training run of a recipe against the device that would train."""
    train = ship.training
    assert train is not None
    device = training_device(train.device)
    return memory_of(job_of(train, row_length(ship), device), ship.tensors, ship.configuration, device)


def row_length(ship: Resolved) -> int:
    """Tokens of the longest row that is trained on: counted where that takes no time, else planned for."""
    train = ship.training
    named = train.max_length if train else None
    if train and train.packing and named:
        return named
    stage = DataStage(ship)
    if stage.is_read_by_a_plan:
        with tempfile.TemporaryDirectory(prefix="forge-plan-") as out, contextlib.suppress(DataError):
            # A row that is refused is reported by the stage's own look.
            positions = ship.configuration.max_positions
            return prepare(stage.settings(), ship.prompt_format, positions, Path(out)).longest_tokens
    return named or min(PLANNING_LENGTH, ship.configuration.max_positions or PLANNING_LENGTH)


def _shown(title: str, memory: Memory, serving: int) -> Mapping[str, object]:
    rows = [(name, f"{count / 1e6:,.1f} MB") for name, count in memory.estimate.parts.items() if count]
    job = memory.job
    report.table(
        f"{title}: {job.method}, {job.batch} x {job.length} tokens"
        + (", gradient checkpointing" if job.checkpointing else ""),
        ("part", "bytes"),
        [*rows, ("in all", f"{memory.estimate.total / 1e9:,.2f} GB")],
    )
    show_fit(memory)
    gpus = gpus_that_fit(memory.estimate.total)
    report.info(
        "fits on: " + (", ".join(name for name, fits in gpus.items() if fits) or "none of the usual GPUs")
    )
    report.info(f"serving it as {_QUANT} takes {serving / 1e9:.1f} GB")
    return {**memory.as_json(), "inference_bytes": serving, "gpus": gpus}


def show_fit(memory: Memory) -> None:
    """Say whether it fits, and what would make it fit."""
    free = f"{memory.device.free / 1e9:.1f} GB free of {memory.device.name}"
    if memory.fits:
        report.info(f"training: {memory.estimate.total / 1e9:.1f} GB needed, {free}")
        return
    report.warning(f"training: {memory.estimate.total / 1e9:.1f} GB needed, {free}: it does not fit")
    if memory.cheapest_change is None:
        report.warning("no setting makes it fit: take a smaller base or a larger device")
    else:
        report.info(f"it would fit with {_in_words(memory.cheapest_change)}")


def _in_words(change: Mapping[str, Setting]) -> str:
    return ", ".join(
        f"{name}: {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in change.items()
    )
