"""What `forge validate` takes for an adapter of a model of 7 billion parameters: seconds, and memory.

The base has no weights that matter: its files are sparse, of the size that they would have. The
adapter is whole, of rank 16 on every linear layer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from bench.measure import FORGE, Outcome, peak_of
from bench.workplace import Workplace
from forge.model.checkpoint import SINGLE

SECONDS = 60.0
GIGABYTES = 0.5
_RANK = 16
_CONFIGURATION: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip
_LINEAR = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008),
}  # fmt: skip


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Once: a limit of so many times the usual import of torch needs no repetition."""
    base, adapter = _base(place.directory / "base"), _adapter(place.directory / "adapter")
    command = [FORGE, "validate", "--base", str(base), "--adapter", str(adapter), "--json"]
    peak, seconds = peak_of(command, directory=place.directory, environment=place.environment)
    yield Outcome("forge validate, 7 billion: seconds", seconds, "s", SECONDS)
    yield Outcome("forge validate, 7 billion: memory", peak / 1e9, "GB", GIGABYTES)


def _base(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(_CONFIGURATION), encoding="utf-8")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens", "lm_head"), (32000, 4096))
    for layer in range(32):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _LINEAR.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{layer}.{name}": (4096,) for name in norms}
    shapes["model.norm"] = (4096,)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    told = json.dumps(header).encode()
    with (directory / SINGLE).open("wb") as stream:
        stream.write(struct.pack("<Q", len(told)) + told)
        stream.truncate(stream.tell() + end)
    return directory


def _adapter(directory: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    tensors = {}
    for layer in range(32):
        for name, (rows, columns) in _LINEAR.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(_RANK, columns) * 0.01
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, _RANK) * 0.01
    save_file(tensors, directory / "adapter_model.safetensors")
    configuration = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": 2 * _RANK,
        "target_modules": sorted(name.partition(".")[2] for name in _LINEAR), "bias": "none",
        "base_model_name_or_path": "base", "inference_mode": True,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(configuration), encoding="utf-8")
    return directory
