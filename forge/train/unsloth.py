"""The model of an installed Unsloth, for trl's loop. Runs in a worker, on an NVIDIA GPU.

Unsloth replaces classes of transformers, peft and trl when it is imported, which must be before they are.
What it makes is an adapter of peft as any other: saved, validated and proved in the same way. What it would
train otherwise than the recipe says is refused (`recipe/training_checks.py`). Written against unsloth
2026.10.9; not covered: which families it has.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from forge.errors import MissingToolError, StageError
from forge.train.hardware import Hardware
from forge.train.lora import targets_of
from forge.train.request import TrainRequest


def import_unsloth(work: Path) -> None:
    """Import it, with what it compiles kept in `work` and nothing reported to anyone.

    Raises `MissingToolError` where it cannot be imported.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(work / "unsloth_compiled"))
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    try:
        importlib.import_module("unsloth")
    except (ImportError, NotImplementedError) as error:
        raise MissingToolError(
            f"train.backend: unsloth cannot be imported: {error}",
            hint="pip install unsloth, in an environment of its own, or leave train.backend out",
        ) from error


def unsloth_model(request: TrainRequest, hardware: Hardware, checkpointing: bool) -> Any:
    """The base with fresh LoRA layers, as Unsloth makes them; raises `StageError` where it does not."""
    import torch

    unsloth = importlib.import_module("unsloth")
    settings, lora = request.settings, request.settings.lora
    try:
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=str(request.base),
            max_seq_length=request.max_length,
            dtype=getattr(torch, hardware.compute),
            load_in_4bit=settings.method == "qlora",
            trust_remote_code=request.trust_remote_code,
            use_exact_model_name=True,  # else it takes weights of its own of that name from the hub
            use_gradient_checkpointing=checkpointing,
            random_state=settings.seed,
        )
        return unsloth.FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            target_modules=targets_of(model, lora.targets, lora.layers),
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            layers_to_transform=list(lora.layers) or None,
            use_gradient_checkpointing=checkpointing,
            random_state=settings.seed,
        )
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise StageError(
            f"train.backend: unsloth does not take this base: {error}", hint="leave train.backend out"
        ) from error
