"""Runs' directories as a ship leaves them, for tests of what reads runs: no model is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.recipe.load import load
from forge.recipe.schema import Recipe, Train

RECIPE: Mapping[str, Any] = {
    "base": "builtin:tiny",
    "data": {"source": "builtin:yoda", "columns": {"prompt": "sentence", "completion": "translation_extra"}},
}
CERTIFICATE: Mapping[str, Any] = {
    "ok": True,
    "verdict": "the q4_k_m file is base and adapter",
    "logits": {"nmse": 1e-4, "kl_mean": 0.02, "kl_max": 0.5, "top1": 0.97, "perplexity_gguf": 4.5},
}
_QUESTION = {"role": "user", "content": "The sky is blue."}
_ANSWER = {"messages": [_QUESTION], "expected": "Blue, the sky is.", "before": "", "after": "x"}


def write_run(name: str, *overrides: str, **changes: Any) -> Path:
    """A run of `RECIPE` in the working directory; `changes` are fields of its manifest."""
    loaded = load(Path("recipe"), (f"name={name}", *overrides), text=json.dumps(RECIPE))
    return write_finished(loaded.recipe, **changes)


def write_finished(recipe: Recipe, /, **changes: Any) -> Path:
    """The manifest that a ship of the recipe leaves, with figures that follow from the rank."""
    assert isinstance(recipe.train, Train)
    rank = recipe.train.lora.r
    served = "Blue, the sky is." if rank > 8 else "It is."
    facts = {
        "train": {"trainable_parameters": 1000 * rank, "seconds": 3.5, "peak_memory_bytes": 2 * 10**9},
        "evaluate": {
            "rows": 8,
            "loss": {"before": 3.0, "after": 20 / (rank + 1)},
            "perplexity": {"before": 20.0, "after": 2.0},
            "exact": {"rows": 1, "before": 0, "after": 0, "answers": [_ANSWER]},
        },
        "export": {"mode": "merged", "quant": "q4_k_m", "seconds": 1.25},
        "smoke": {
            "smoke": [{"prompt": "Hello <b>", "answer": f"{recipe.name}: hi", "ok": True}],
            "heldout": {
                "rows": 1,
                "exact": int(served == _ANSWER["expected"]),
                "stopped": 1,
                "answers": [{**_ANSWER, "served": served, "finish_reason": "stop"}],
            },
        },
    }
    file = {"sha256": "s", "bytes": 3_000_000}
    manifest = {
        "name": recipe.name,
        "outcome": "shipped",
        "written": "2026-11-29T12:00:00+0000",
        "recipe": recipe.as_json(),
        "base": {"spec": "builtin:tiny", "digest": "d1"},
        "artifacts": {"export": {"key": "k", "digest": "d", "files": {"model.gguf": file}}},
        "facts": facts,
        "certificate": CERTIFICATE,
        "certificate_reason": None,
        "learned": {"metric": "exact_match", "before": 0.0, "after": 1.0, "rows": 1, "served": True},
        "stages": [{"name": "train", "cached": False, "seconds": 4.0}],
        **changes,
    }
    directory = Path("runs", recipe.name)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return directory
