"""Whether a training run fits the memory of the device that will train, and what would make it fit.

Runs in forge itself, without torch: a GPU is asked through nvidia-smi. Not covered: several GPUs of
different sizes (the first one counts), Apple's and AMD's (their memory counts as main memory).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal, TypeAlias

from forge import process
from forge.adapter.experts import expert_tensors
from forge.errors import ForgeError
from forge.model.config import Configuration
from forge.model.estimate import Estimate, available, training
from forge.model.safetensors_header import TensorSpec
from forge.recipe.schema import Train

PLANNING_LENGTH = 1024  # tokens of a row, where nothing says how long the rows are
_MOST_ROWS = 64
_USABLE = 0.9  # share of a device's memory
# What FSDP and ZeRO 3 cut into as many parts as there are devices.
_SHARED = ("base", "quantization scales", "adapter", "gradients", "optimizer")
# GB of memory of the GPUs that the estimate is held against.
GPUS: Mapping[str, int] = {
    "GTX 1060": 6, "RTX 3080": 10, "RTX 3060": 12, "T4": 15, "RTX 4080": 16, "RTX 3090": 24, "RTX 4090": 24,
    "A10G": 24, "A5000": 24, "A100 40 GB": 40, "A100 80 GB": 80, "H100": 80,
}  # fmt: skip

Setting: TypeAlias = str | int | bool
"""The value of a recipe's field."""


@dataclass(frozen=True)
class Device:
    """Where a run would train: `kind` is cuda or cpu; bytes in all, and free now."""

    kind: Literal["cuda", "cpu"]
    name: str
    total: int
    free: int
    has_bfloat16: bool

    @property
    def usable(self) -> float:
        """The bytes that choices count on: of what is there, not of what happens to be free, so that the
        same machine always trains alike.
        """
        return _USABLE * self.total


@dataclass(frozen=True)
class Job:
    """A run as the estimate sees it. `length` is that of the longest row, in tokens."""

    method: Literal["qlora", "int8", "lora", "full"]
    batch: int
    accumulation: int
    length: int
    checkpointing: bool
    attention: Literal["eager", "sdpa"]
    dtype_bytes: int
    rank: int
    train: Train


@dataclass(frozen=True)
class Memory:
    """The estimate of a job, against a device; `cheapest_change` is recipe fields, None where none helps."""

    estimate: Estimate
    device: Device
    job: Job
    cheapest_change: Mapping[str, Setting] | None

    @property
    def fits(self) -> bool:
        return self.estimate.total <= self.device.free

    def as_json(self) -> Mapping[str, object]:
        change = dict(self.cheapest_change) if self.cheapest_change is not None else None
        return {
            "train_bytes": self.estimate.total,
            "breakdown": dict(self.estimate.parts),
            "device": {"kind": self.device.kind, "name": self.device.name, "free": self.device.free},
            "method": self.job.method,
            "batch": self.job.batch,
            "length": self.job.length,
            "checkpointing": self.job.checkpointing,
            "fits": self.fits,
            "cheapest_change": change,
        }


def training_device(asked: str) -> Device:
    """The device that `train.device` means here."""
    gpu = None if asked in ("cpu", "mps") else _gpu()
    if gpu:
        return gpu
    memory = available()
    return Device("cpu", "main memory", memory.total, memory.free, _processor_has_bfloat16())


def _gpu() -> Device | None:
    """The first NVIDIA GPU, where the installed torch is built for it."""
    if named_gpus() == () or shutil.which("nvidia-smi") is None or not is_torch_built_for("cuda"):
        return None
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    try:
        output = process.run(["nvidia-smi", query, "--format=csv,noheader,nounits"]).output
    except (ForgeError, OSError):
        return None
    for line in output.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[1].isdecimal() and parts[2].isdecimal():
            native = parts[3].partition(".")[0].isdecimal() and int(parts[3].partition(".")[0]) >= 8
            return Device("cuda", parts[0], int(parts[1]) << 20, int(parts[2]) << 20, native)
    return None


def named_gpus() -> Sequence[str] | None:
    """Those that CUDA_VISIBLE_DEVICES leaves, which nvidia-smi does not read; None where it names none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return None
    return tuple(takewhile(lambda gpu: gpu not in ("", "-1"), map(str.strip, named.split(","))))


def is_torch_built_for(platform: Literal["cuda", "hip"]) -> bool:
    """Whether the installed torch is built for NVIDIA's GPUs, or for AMD's."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return False
    text = (Path(package.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(rf"^{platform}\b[^=]*= *['\"]", text, re.MULTILINE) is not None


def _processor_has_bfloat16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def job_of(train: Train, length: int, device: Device) -> Job:
    """The run that a recipe asks for; `auto` of method and batch are still open: QLoRA, and one row."""
    sixteen_bits = device.kind == "cuda" or device.has_bfloat16
    return Job(
        method="qlora" if train.method == "auto" else train.method,
        batch=train.least_batch if train.batch_size == "auto" else train.batch_size,
        accumulation=train.gradient_accumulation,
        length=length,
        checkpointing=device.kind == "cuda"
        if train.gradient_checkpointing == "auto"
        else train.gradient_checkpointing,
        attention="eager" if train.attention == "eager" else "sdpa",
        dtype_bytes=4 if train.dtype == "fp32" or (train.dtype == "auto" and not sixteen_bits) else 2,
        rank=max(train.lora.r, *train.lora.rank_pattern.values())
        if train.lora.rank_pattern
        else train.lora.r,
        train=train,
    )


def estimate_of(
    job: Job, tensors: Mapping[str, TensorSpec], configuration: Configuration, device: Device
) -> Estimate:
    """The bytes that the job takes on the device, where it has others its share of them."""
    whole = training(
        tensors,
        configuration,
        method=job.method,
        rank=job.rank,
        batch=job.batch * (2 if job.train.objective in ("dpo", "orpo") else 1),  # both answers of a pair
        sequence=min(job.length, configuration.max_positions or job.length),
        dora=job.train.lora.dora,
        dropout=job.train.lora.dropout > 0,
        targets=job.train.lora.targets,
        experts=expert_tensors(tensors).values() if job.train.lora.experts else (),
        optimizer=job.train.optimizer,
        dtype_bytes=job.dtype_bytes,
        checkpointing=job.checkpointing,
        attention=job.attention,
        double_quantization=job.train.double_quantization,
        cuda=device.kind == "cuda",
        whole_logits=job.train.objective == "orpo",  # trl's trainer for it has no fused output layer
    )
    shares = _shares(job.train)
    return Estimate(
        {part: count // (shares if part in _SHARED else 1) for part, count in whole.parts.items()}
    )


def _shares(train: Train) -> int:
    """Among how many devices FSDP or ZeRO 3 share the model out; 1 where each has it whole."""
    return 1 if train.strategy == "ddp" else train.processes or 1


def memory_of(
    job: Job, tensors: Mapping[str, TensorSpec], configuration: Configuration, device: Device
) -> Memory:
    """The estimate, and the first change by which the job would fit where it does not."""
    estimate = estimate_of(job, tensors, configuration, device)
    if estimate.total <= device.free:
        return Memory(estimate, device, job, {})
    for fields, cheaper in _changes(job):
        if estimate_of(cheaper, tensors, configuration, device).total <= device.free:
            return Memory(estimate, device, job, fields)
    return Memory(estimate, device, job, None)


def _changes(job: Job) -> Iterator[tuple[Mapping[str, Setting], Job]]:
    """From what costs nothing to what changes the result, each on top of those before."""
    fields: dict[str, Setting] = {}
    if job.attention == "eager":
        job, fields = replace(job, attention="sdpa"), fields | {"train.attention": "sdpa"}
        yield fields, job
    if not job.checkpointing:
        job, fields = replace(job, checkpointing=True), fields | {"train.gradient_checkpointing": True}
        yield fields, job
    while job.batch >= 2 * job.train.least_batch:
        half = job.batch // 2
        job = replace(job, batch=half, accumulation=job.accumulation * 2)
        fields |= {"train.batch_size": half, "train.gradient_accumulation": job.accumulation}
        yield dict(fields), job
    for method in ("lora", "qlora"):
        if method == "qlora" and not job.train.may_cut_four_bits:
            continue
        if job.method in ("full", "int8", "lora") and job.method != method:
            job, fields = replace(job, method=method), fields | {"train.method": method}
            yield fields, job
    while job.length > 256:
        job = replace(job, length=job.length // 2)
        fields |= {"train.max_length": job.length}
        yield dict(fields), job


def choose_method(
    train: Train, tensors: Mapping[str, TensorSpec], configuration: Configuration, length: int
) -> tuple[Literal["qlora", "lora"], str]:
    """What `method: auto` means on this machine, and why."""
    device = training_device(train.device)
    job = replace(job_of(train, length, device), method="lora")
    needed = estimate_of(job, tensors, configuration, device).total
    sizes = f"{needed / 1e9:.1f} GB of {device.name}'s {device.total / 1e9:.1f} GB"
    if needed <= device.usable:
        return "lora", f"16-bit LoRA takes {sizes}"
    if estimate_of(replace(job, method="qlora"), tensors, configuration, device).total >= needed:
        what = "its experts" if expert_tensors(tensors) else "the embedding"
        return "lora", f"16-bit LoRA takes {sizes}, and QLoRA more: {what} would be held in 32 bits"
    return "qlora", f"16-bit LoRA would take {sizes}"


def choose_batch(
    train: Train, tensors: Mapping[str, TensorSpec], configuration: Configuration, length: int
) -> int:
    """What `batch_size: auto` means: the largest power of two that fits, `_MOST_ROWS` at most."""
    device = training_device(train.device)
    job = job_of(train, length, device)
    batch = train.least_batch
    while batch < _MOST_ROWS:
        larger = replace(job, batch=batch * 2)
        if estimate_of(larger, tensors, configuration, device).total > device.usable:
            break
        batch *= 2
    return batch


def gpus_that_fit(needed: int) -> dict[str, bool]:
    """Whether the bytes fit each of the GPUs that people have, a tenth of it left free."""
    return {f"{name} ({size} GB)": needed <= _USABLE * size * 1e9 for name, size in GPUS.items()}
