"""What `forge verify` takes: seconds for the quickstart's model, memory for one of 2 billion parameters.

The large model has random weights: memory does not depend on what they are. What counts is memory
that the system cannot take back (anonymous pages, of all processes together, sampled twenty times a
second): the files themselves are mapped, and their pages are dropped where memory is short.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import FORGE, Outcome, peak_of, run
from bench.workplace import QUICKSTART, Workplace
from forge.model.base import BUILTIN
from forge.model.checkpoint import SINGLE

SECONDS = 90.0
GIGABYTES = 3.0
_SHORT = ("-o", "train.max_steps=4", "-o", "verify.learned=off")
_SHAPE: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
    "num_hidden_layers": 30, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 64000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu", "dtype": "bfloat16",
    "bos_token_id": None,
}  # fmt: skip
_ROWS = 8


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Seconds of the verify stage on the quickstart's files, and the peak memory for 2 billion parameters."""
    command = [FORGE, "ship", str(QUICKSTART), *_SHORT, "--until", "modelfile", "--json"]
    run(command, directory=place.directory, environment=place.environment)
    command = [FORGE, "verify", str(QUICKSTART), *_SHORT, "--json"]
    verified = run(command, directory=place.directory, environment=place.environment)
    yield Outcome("forge verify, quickstart", verified.seconds, "s", SECONDS)
    base, rows = make_large(place.directory / "large"), place.directory / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"Is it {n}?", "completion": f"It is {n}."}) + "\n" for n in range(_ROWS)
        )
    )
    file = place.directory / "large.gguf"
    export = [FORGE, "export", "--base", str(base), "--out", str(file), "--quant", "q4_k_m"]
    run(export, directory=place.directory, environment=place.environment)
    command = [FORGE, "verify", "--base", str(base), "--gguf", str(file), "--data", str(rows)]
    peak, seconds = peak_of(command, directory=place.directory, environment=place.environment)
    note = f"{_parameters() / 1e9:.2f} billion parameters, {seconds:.0f} s"
    yield Outcome("forge verify, memory", peak / 1e9, "GB", GIGABYTES, note=note)


def make_large(directory: Path) -> Path:
    """A Llama of 2 billion random parameters with the built-in tokenizer, written tensor by tensor."""
    from forge.export.tensors import LazyTensor, write_safetensors

    directory.mkdir()
    for path in (BUILTIN / "tiny").iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            (directory / path.name).write_bytes(path.read_bytes())
    (directory / "config.json").write_text(json.dumps(_SHAPE), encoding="utf-8")
    tensors = [LazyTensor(name, "BF16", shape, partial(_random, shape)) for name, shape in _shapes().items()]
    write_safetensors(directory / SINGLE, tensors, lambda done, total: None)
    return directory


def _random(shape: tuple[int, ...], start: int, stop: int) -> Any:
    """Rows of a matrix, or a norm's ones."""
    import torch

    if len(shape) == 1:
        return torch.ones((1, *shape), dtype=torch.bfloat16)
    return (torch.randn(stop - start, shape[1]) * 0.02).to(torch.bfloat16)


def _shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner = _SHAPE["hidden_size"], _SHAPE["intermediate_size"]
    narrow = _SHAPE["num_key_value_heads"] * _SHAPE["head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_SHAPE["vocab_size"], hidden)}
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for number in range(_SHAPE["num_hidden_layers"]):
        found |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (hidden,)}


def _parameters() -> int:
    return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in _shapes().values())
