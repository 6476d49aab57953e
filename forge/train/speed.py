"""What may make training faster or smaller without changing what is learned, and whether it is used here.

`auto` turns on what is exact and available; each choice comes with its reason, for a plan and for the run.
Runs in forge itself, without torch: packages are looked for and read, not imported.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from forge.errors import MissingToolError, Problem
from forge.model.config import Configuration
from forge.recipe.schema import Train
from forge.train.memory import Device, Memory, is_torch_built_for

_LIGER, _UNSLOTH = "liger_kernel", "unsloth"
# Beginnings of the names of optimizers, and the package that they are in: its module, and pip's name of it.
_OPTIMIZERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("lomo", "adalomo"), "lomo_optim", "lomo-optim"),
    (("grokadamw",), "grokadamw", "grokadamw"),
    (("schedule_free",), "schedulefree", "schedulefree"),
    (("stable_adamw",), "optimi", "torch-optimi"),
    (("adamw_torch_4bit", "adamw_torch_8bit"), "torchao", "torchao"),
    (("adamw_anyprecision",), "torchdistx", "torchdistx"),
)
_NO_GPU = "no NVIDIA GPU trains here"


@dataclass(frozen=True)
class Choice:
    """What `auto` means for a field here, and why."""

    field: str
    value: bool
    reason: str


@dataclass(frozen=True)
class Speed:
    """What the run uses, as the recipe says it or as was chosen; `choices` are those of `auto`."""

    liger: bool
    compile: bool
    offload_activations: bool
    choices: tuple[Choice, ...]


def choose_speed(train: Train, configuration: Configuration, memory: Memory) -> Speed:
    """What each field means on this machine; `memory` is that of the run without activation offloading."""
    has_gpu, family = memory.device.kind == "cuda", configuration.model_type
    liger = _no_liger(train, family, has_gpu=has_gpu)
    offload = _no_offloading(train, memory, has_gpu=has_gpu)
    automatic = {
        "liger": (not liger, liger or f"exact, and liger-kernel has kernels for {family}"),
        "compile": (False, "it rounds otherwise, and each new length of the rows is compiled anew"),
        "offload_activations": (not offload, offload or "the run would not fit the GPU without"),
    }
    choices = tuple(
        Choice(f"train.{name}", value, reason)
        for name, (value, reason) in automatic.items()
        if getattr(train, name) == "auto"
    )
    chosen = {choice.field: choice.value for choice in choices}
    used = {name: bool(chosen.get(f"train.{name}", getattr(train, name))) for name in automatic}
    return Speed(**used, choices=choices)


def require_available(train: Train, configuration: Configuration, device: Device) -> None:
    """Raise `MissingToolError` with all that the recipe asks for by name and cannot be had on the device."""
    problems = list(_impossible(train, configuration.model_type, device))
    if problems:
        raise MissingToolError(
            problems[0].message if len(problems) == 1 else f"{len(problems)} settings of train cannot be had",
            hint="leave it out, or train where it can be had",
            problems=problems if len(problems) > 1 else (),
        )


def _impossible(train: Train, family: str, device: Device) -> Iterator[Problem]:
    """What is asked for by name and cannot be had on this machine, or for this base."""
    has_gpu = device.kind == "cuda"
    if train.liger is True:
        if not has_gpu:
            yield Problem(f"train.liger: its kernels run on a GPU, and {_NO_GPU}")
        elif not _is_installed(_LIGER):
            yield Problem("train.liger: the package is not installed: pip install liger-kernel")
        elif family not in liger_families():
            yield Problem(f"train.liger: liger-kernel has no kernels for {family}")
    if train.offload_activations is True and not has_gpu:
        yield Problem(f"train.offload_activations: moves what a GPU holds to main memory, and {_NO_GPU}")
    if train.device == "cuda" and not has_gpu and not is_torch_built_for("hip"):
        yield Problem(f"train.device: cuda is a GPU, and {_NO_GPU}")
    if train.device == "mps" and sys.platform != "darwin":
        yield Problem("train.device: mps is a Mac's GPU, and this is none")
    if train.attention.startswith("flash"):
        yield from _no_flash(train, device)
    for names, package, pip in _OPTIMIZERS:
        if train.optimizer.startswith(names) and not _is_installed(package):
            yield Problem(f"train.optimizer: {train.optimizer} needs a package: pip install {pip}")
    if train.strategy != "ddp":
        if not has_gpu:
            yield Problem(f"train.strategy: {train.strategy} is for GPUs, and {_NO_GPU}; use ddp")
        elif train.strategy == "deepspeed" and not _is_installed("deepspeed"):
            yield Problem("train.strategy: the package is not installed: pip install deepspeed")
    if train.backend == "unsloth":
        if not has_gpu:
            yield Problem(f"train.backend: unsloth trains on a GPU, and {_NO_GPU}")
        elif not _is_installed(_UNSLOTH):
            yield Problem(
                "train.backend: unsloth is not installed: pip install unsloth, in an environment of its own "
                "(pip takes older versions of transformers, trl and datasets for it)"
            )


_FLASH = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "build hopper/ of flash-attention's repository"),
}
"""The package that transformers asks for, and how to get it."""


def _no_flash(train: Train, device: Device) -> Iterator[Problem]:
    """H1: which GPU and which package a named FlashAttention needs."""
    if device.kind != "cuda":
        yield Problem(f"train.attention: {train.attention} runs on a GPU, and {_NO_GPU}")
    elif not device.has_bfloat16:
        yield Problem(f"train.attention: {train.attention} needs a GPU from Ampere on, not {device.name}")
    else:
        package, way = _FLASH[train.attention]
        if not _is_installed(package) and not _is_installed("kernels"):
            yield Problem(f"train.attention: the package is not installed: {way}, or pip install kernels")


def _no_liger(train: Train, family: str, *, has_gpu: bool) -> str:
    """Why `auto` leaves the kernels out; empty where it takes them."""
    if not has_gpu:
        return _NO_GPU
    if train.backend == "unsloth":
        return "unsloth has kernels of its own"
    if train.compile is True:
        return "torch.compile joins the same layers"
    if not _is_installed(_LIGER):
        return "liger-kernel is not installed"
    if family not in liger_families():
        return f"liger-kernel has no kernels for {family}"
    return ""


def _no_offloading(train: Train, memory: Memory, *, has_gpu: bool) -> str:
    if not has_gpu:
        return _NO_GPU
    if train.backend == "unsloth":
        return "unsloth has its own"
    if train.objective == "orpo":
        return "trl's trainer for ORPO has no such option"
    if train.compile is True:
        return "torch.compile keeps what it saves to itself"
    if memory.estimate.total <= memory.device.usable:
        return "the run fits the GPU without, and moving takes time"
    return ""


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def liger_families() -> Collection[str]:
    """The families for which the installed liger-kernel has kernels, read from its source."""
    package = importlib.util.find_spec(_LIGER)
    if package is None or package.origin is None:
        return ()
    source = Path(package.origin).parent / "transformers" / "monkey_patch.py"
    if not source.is_file():
        return ()
    _, _, table = source.read_text(encoding="utf-8").partition("MODEL_TYPE_TO_APPLY_LIGER_FN")
    return re.findall(r'^    "(\w+)":', table.partition("}")[0], re.MULTILINE)
