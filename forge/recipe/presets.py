"""Settings of a training run by name: those of the documents that forge began with, and of common GPUs.

A preset fills what the recipe leaves unset; what the recipe says itself stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from forge.recipe.tree import Node

Preset = Literal["book-ch0", "book-ch5", "gpt2", "overview", "rtx3090", "t4"]
_BOOK: Mapping[str, Any] = {
    "method": "qlora", "max_length": 64, "packing": True, "epochs": 10.0, "learning_rate": 3e-4,
    "lora.r": 8, "lora.alpha": 16, "lora.dropout": 0.05,
}  # fmt: skip
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "book-ch0": {**_BOOK, "batch_size": 16, "gradient_accumulation": 1, "optimizer": "paged_adamw_8bit"},
    "book-ch5": {**_BOOK, "batch_size": 8, "gradient_accumulation": 2, "lora.r": 16, "lora.alpha": 32},
    "gpt2": {
        "method": "lora", "epochs": 3.0, "batch_size": 4, "gradient_accumulation": 4, "dtype": "fp16",
        "gradient_checkpointing": True, "learning_rate": 2e-4, "schedule": "cosine",
        "warmup_fraction": 0.05, "lora.r": 8, "lora.alpha": 32, "lora.dropout": 0.1,
    },
    "overview": {
        "method": "qlora", "epochs": 1.0, "batch_size": 2, "gradient_accumulation": 8, "dtype": "bf16",
        "max_length": 2048, "lora.r": 16, "lora.alpha": 32,
    },
    "rtx3090": {
        "method": "qlora", "epochs": 3.0, "batch_size": 2, "gradient_accumulation": 8, "dtype": "bf16",
        "learning_rate": 2e-4, "evaluation_steps": 200, "lora.r": 16, "lora.alpha": 32,
    },
    "t4": {
        "method": "qlora", "batch_size": 1, "gradient_accumulation": 16, "dtype": "fp16",
        "gradient_checkpointing": True, "max_length": 1024, "lora.r": 16, "lora.alpha": 32,
    },
}  # fmt: skip


def fill_preset(root: Node) -> None:
    """Put the settings of `train.preset` where the recipe has none, at the preset's own place."""
    named, depth = root.follow(("train", "preset"))
    train = root.child("train")
    # Not yet checked: what a recipe says may be a list, which no key can be.
    if depth < 2 or train is None or not isinstance(named.value, str) or named.value not in PRESETS:
        return
    for field, value in PRESETS[named.value].items():
        if field == "epochs" and train.child("max_steps") is not None:
            continue
        section, _, name = field.rpartition(".")
        below = train.value.setdefault(section, Node({}, named.place)) if section else train
        if isinstance(below.value, dict):
            below.value.setdefault(name, Node(value, named.place))
