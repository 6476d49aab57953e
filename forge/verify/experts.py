"""What peft adapts of joined experts, to be looked up in a file. Runs in a worker.

transformers' own words say how a parameter is laid out (`is_transposed`, `is_concatenated`), and peft merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from forge.verify.spread import spread
from forge.verify.tuned import Opened, parameter_of

_LAYERS = 4


def experts(opened: Opened) -> Iterator[tuple[str, Any, Any]]:
    """Name, weight and what is added, (experts, out, in), gate before up.

    By the names that gguf's table has for all experts of a layer; of a few layers, for one of them in float32
    is large.
    """
    modules = [name for name, layer in opened.layers.items() if parameter_of(layer) != "weight"]
    for module in spread(modules, _LAYERS):
        layer = opened.layers[module]
        base = layer.get_base_layer()
        while (parameter := parameter_of(layer)) != "weight":
            weight, added = _read(opened, module, layer)
            if getattr(base, "is_transposed", False):
                weight, added = weight.mT, added.mT
            parts = {parameter: slice(None)}
            if parameter == "gate_up_proj" and getattr(base, "is_concatenated", True):
                half = weight.shape[1] // 2
                parts = {"gate_proj": slice(half), "up_proj": slice(half, None)}
            elif parameter == "gate_up_proj":
                parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
            for name, own in parts.items():
                place = f"{module}.{name}.weight".replace(".block_sparse_moe.", ".mlp.")
                yield place, weight[:, own], added[:, own]
            layer = layer.base_layer


def _read(opened: Opened, module: str, layer: Any) -> tuple[Any, Any]:
    """The parameter that `layer` wraps, and what its merge adds to it."""
    import torch

    base, name = layer.get_base_layer(), parameter_of(layer)
    stand_in = getattr(base, name)
    weight = opened.loader.parameter([f"{module}.{name}"], stand_in.shape, False)
    setattr(base, name, torch.nn.Parameter(weight.clone(), requires_grad=False))
    with torch.inference_mode():
        layer.merge()
        added = getattr(base, name) - weight
    layer.merged_adapters.clear()
    setattr(base, name, stand_in)
    return weight, added
