"""How much memory and disk a recipe will take, from headers and config.json only.

Weights, adapter and optimizer are exact; activations follow the formula of Korthikanti et al.
(https://arxiv.org/abs/2205.05198): layers x (34 h b s + 5 heads b s^2) bytes in 16 bits, without the
square term for sdpa and flash attention; a LoRA layer keeps its input beside. The start-up of a process is a
measured constant, and so is what main memory loses between blocks.

Not covered: fragmentation of a GPU's memory, logits outside trl's fused head, layers of
experts that are inactive.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import psutil

from forge.model.config import Configuration
from forge.model.safetensors_header import TensorSpec

# State of the optimizer, bytes per trained parameter (Adafactor keeps row and column sums).
OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_32bit": 8, "adamw_bnb_8bit": 2,
    "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 1, "sgd": 0, "lion_32bit": 4, "paged_lion_32bit": 4,
    "lion_8bit": 1, "paged_lion_8bit": 1, "rmsprop": 4, "adagrad": 4, "ademamix_8bit": 3, "lomo": 0,
}  # fmt: skip

# bitsandbytes keeps one scale for 64 weights: 32 bits, or 8.127 with double quantization.
SCALE_BITS, DOUBLE_SCALE_BITS = 0.5, 0.127

# Bits per weight of a whole file, as llama.cpp's quantize reports for a 7B model.
QUANT_BITS: Mapping[str, float] = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.56, "q5_k_m": 5.68, "q5_k_s": 5.52,
    "q5_1": 5.9, "q5_0": 5.53, "q4_k_m": 4.85, "q4_k_s": 4.58, "q4_1": 5.0, "q4_0": 4.55, "iq4_nl": 4.56,
    "iq4_xs": 4.32, "q3_k_l": 4.22, "q3_k_m": 3.91, "q3_k_s": 3.5, "q2_k": 3.35, "iq3_m": 3.66, "iq3_s": 3.44,
    "iq3_xxs": 3.06, "iq2_m": 2.7, "iq2_s": 2.5, "iq2_xs": 2.31, "iq2_xxs": 2.06,
}  # fmt: skip

# Resident size of a worker that has imported torch, transformers, peft and trl; of a server without a model.
TRAINING_START_BYTES, SERVER_START_BYTES = 900_000_000, 100_000_000

# What a CUDA process holds before its first tensor: the context, cuBLAS's workspace, loaded kernels.
CUDA_CONTEXT_BYTES = 600_000_000
# Main memory is not given back between blocks that live on: what glibc's heap takes of the activations' own
# bytes, and with checkpointing, whose inputs of layers lie in it all along, of what there would be without.
# Measured on SmolLM2 with forge's own training: 1.25 to 1.6, and 0.58.
_HEAP, _HEAP_BETWEEN_INPUTS = 1.5, 0.6
# trl computes the loss from the output layer in pieces of this many tokens, and their gradients beside.
_LOSS_CHUNK_TOKENS = 256

_ATTENTION_MODULE = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention)\.")
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_positions|tok_embeddings|word_embeddings|position_embeddings|embed_in|wte|wpe|"
    r"shared|lm_head|embed_out)\.weight$|^output\.weight$"
)
# Parameters of modules of their own as transformers loads them, the experts of a layer joined.
_OF_MIXTURES = re.compile(r"\.experts\.\d+\.|\.(mlp|block_sparse_moe|feed_forward)\.(gate|router)\.weight$")


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for."""

    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Available:
    """Main memory in bytes: what this process may have in all, and what is free now."""

    total: int
    free: int


def linear_tensors(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The weights of linear layers: what QLoRA quantizes and `all-linear` adapts.

    No embedding, no head, and neither experts nor routers.
    """
    return {
        name: tensor
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2
        and name.endswith(".weight")
        and not _EMBEDDING.search(name)
        and not _OF_MIXTURES.search(name)
    }


def target_tensors(
    tensors: Mapping[str, TensorSpec], targets: str | Collection[str]
) -> dict[str, TensorSpec]:
    """The linear weights that LoRA `targets` name.

    `auto`, `all-linear`, `attention`, a regular expression of whole names, or names matched as peft does.
    """
    linear = linear_tensors(tensors)
    if targets in ("auto", "all-linear"):
        return linear
    if targets == "attention":
        return {name: tensor for name, tensor in linear.items() if _ATTENTION_MODULE.search(name)}
    if isinstance(targets, str):
        return {
            name: tensor
            for name, tensor in linear.items()
            if re.fullmatch(targets, name.removesuffix(".weight"))
        }
    modules = {name: name.removesuffix(".weight") for name in linear}
    return {
        name: linear[name]
        for name, module in modules.items()
        if any(module == target or module.endswith(f".{target}") for target in targets)
    }


def lora_parameters(adapted: Iterable[TensorSpec], rank: int, *, dora: bool = False) -> int:
    """Parameters of A and B over weights of shape (out, in), or (in, out) in a Conv1D: r x (in + out).

    Of joined experts, (experts, out, in), as many for each.

    With `dora` a length for each of the `out` rows too.
    """
    return sum(
        rank * sum(tensor.shape[-2:]) * math.prod(tensor.shape[:-2]) + dora * tensor.shape[0]
        for tensor in adapted
    )


def footprint(
    tensors: Mapping[str, TensorSpec],
    *,
    linear_bits: int | None = None,
    other_bytes: int = 4,
    adapter_parameters: int = 0,
    buffers: int = 0,
) -> int:
    """Exact bytes of a loaded model as `get_memory_footprint` counts them.

    `linear_bits` (4 or 8) for quantized linear layers, None for none; all else takes `other_bytes` a
    parameter, the adapter four, and `buffers` are added. Quantization scales are not counted there.
    """
    linear = sum(tensor.numel for tensor in linear_tensors(tensors).values())
    other = sum(tensor.numel for tensor in tensors.values()) - linear
    linear_bytes = linear * other_bytes if linear_bits is None else linear * linear_bits // 8
    return linear_bytes + other * other_bytes + adapter_parameters * 4 + buffers


def activation_bytes(
    configuration: Configuration,
    *,
    batch: int,
    sequence: int,
    attention: Literal["eager", "sdpa"] = "sdpa",
    checkpointing: bool = False,
    dtype_bytes: int = 2,
) -> int:
    """Activations kept for the backward pass, `batch` rows of `sequence` tokens.

    With gradient checkpointing only each layer's input is kept, and one layer is computed again.
    """
    hidden, layers = configuration.hidden_size or 0, configuration.layers or 0
    tokens = batch * sequence
    layer = 34 * hidden * tokens
    if attention == "eager":
        layer += 5 * (configuration.heads or 0) * batch * sequence**2
    kept = layer + layers * 2 * hidden * tokens if checkpointing else layers * layer
    return kept * dtype_bytes // 2


def adapter_input_bytes(
    adapted: Iterable[TensorSpec], *, tokens: int, dropout: bool, dtype_bytes: int = 2
) -> int:
    """What LoRA's factors, which are float32, keep of the inputs of `adapted` for the backward pass.

    Each layer its own: with dropout a mask and what is left of the input, without it the input where it had
    to be cast. Experts that are joined are computed otherwise.
    """
    kept = 8 if dropout else 4 if dtype_bytes < 4 else 0
    return kept * tokens * sum(tensor.shape[1] for tensor in adapted if len(tensor.shape) == 2)


def _kept_bytes(whole: int, recomputed: int | None, *, cuda: bool) -> int:
    """Of what the backward pass needs the bytes that a device holds; `recomputed` with checkpointing."""
    if cuda:
        return whole if recomputed is None else recomputed
    taken = int(whole * _HEAP)
    return taken if recomputed is None else max(recomputed, int(taken * _HEAP_BETWEEN_INPUTS))


def training(
    tensors: Mapping[str, TensorSpec],
    configuration: Configuration,
    *,
    method: Literal["qlora", "int8", "lora", "full"],
    rank: int,
    batch: int,
    sequence: int,
    dora: bool = False,
    dropout: bool = False,
    targets: str | Collection[str] = "auto",
    optimizer: str = "adamw_torch",
    dtype_bytes: int = 2,
    checkpointing: bool = False,
    attention: Literal["eager", "sdpa"] = "sdpa",
    double_quantization: bool = True,
    cuda: bool = False,
    whole_logits: bool = False,
    experts: Iterable[TensorSpec] = (),
) -> Estimate:
    """Bytes of a training run; `dtype_bytes` is the compute type's (2 for bf16 and fp16, 4 for fp32).

    A quantized base's other weights are fp32: k-bit preparation casts them up. Full training keeps the
    base beside its float32 copy. `optimizer` not in `OPTIMIZER_BYTES` counts as AdamW. With `cuda` it is
    the GPU's memory, else the main one. `whole_logits`: those of all tokens at once, not of a chunk.
    `experts` are adapted beside `targets`.
    """
    whole = sum(tensor.numel for tensor in tensors.values())
    adapted = [*target_tensors(tensors, targets).values(), *experts]
    trained = whole if method == "full" else lora_parameters(adapted, rank, dora=dora)
    linear = sum(tensor.numel for tensor in linear_tensors(tensors).values())
    bits = {"qlora": 4, "int8": 8}.get(method)
    scales = 0.0
    if method == "qlora":
        scales = linear * (DOUBLE_SCALE_BITS if double_quantization else SCALE_BITS) / 8
    elif method == "int8":  # one float32 for each row
        scales = sum(tensor.shape[0] * 4 for tensor in linear_tensors(tensors).values())
    other_bytes = 4 if bits or method == "full" else dtype_bytes
    vocabulary, tokens = configuration.vocabulary_size or 0, batch * sequence
    activations = partial(
        activation_bytes,
        configuration,
        batch=batch,
        sequence=sequence,
        attention=attention,
        dtype_bytes=dtype_bytes,
    )
    inputs = 0
    if method != "full":
        inputs = adapter_input_bytes(adapted, tokens=tokens, dropout=dropout, dtype_bytes=dtype_bytes)
    inputs_of_one = inputs // max(configuration.layers or 1, 1) if checkpointing else None
    recomputed = activations(checkpointing=True) if checkpointing else None
    return Estimate(
        {
            "base": footprint(tensors, linear_bits=bits, other_bytes=other_bytes),
            "quantization scales": int(scales),
            "adapter": trained * 4,
            "gradients": trained * 4,
            "optimizer": int(trained * OPTIMIZER_BYTES.get(optimizer, 8)),
            "activations": _kept_bytes(activations(), recomputed, cuda=cuda),
            "adapter's inputs": _kept_bytes(inputs, inputs_of_one, cuda=cuda),
            "logits": 2 * (tokens if whole_logits else min(tokens, _LOSS_CHUNK_TOKENS)) * vocabulary * 4,
            "batch": batch * sequence * 8 * 3,  # ids, mask and labels, 64 bits each
            **({"CUDA context": CUDA_CONTEXT_BYTES} if cuda else {"libraries": TRAINING_START_BYTES}),
        }
    )


def gguf_bytes(parameters: int, quant: str) -> int:
    """Bytes of a GGUF of `parameters`; raises KeyError for a type that is not in `QUANT_BITS`."""
    return int(parameters * QUANT_BITS[quant.lower()] / 8)


def cache_bytes(configuration: Configuration, *, context: int, slots: int = 1, element_bytes: int = 2) -> int:
    """Keys and values of `slots` conversations of `context` tokens each."""
    heads, size = configuration.key_value_heads or 0, configuration.head_size or 0
    return 2 * (configuration.layers or 0) * heads * size * context * slots * element_bytes


def inference(
    parameters: int, configuration: Configuration, *, quant: str, context: int, slots: int = 1
) -> Estimate:
    """Bytes of a server with the quantized model and its cache."""
    return Estimate(
        {
            "weights": gguf_bytes(parameters, quant),
            "key-value cache": cache_bytes(configuration, context=context, slots=slots),
            "server": SERVER_START_BYTES,
        }
    )


def export_disk(parameters: int, quant: str, *, keep_merged: bool = False) -> Estimate:
    """Bytes on the disk: the GGUF is written in one pass; the merged checkpoint only if it is kept."""
    kept = {"merged checkpoint": parameters * 4} if keep_merged else {}
    return Estimate({"GGUF": gguf_bytes(parameters, quant), **kept})


def certificate_disk(parameters: int, quant: str) -> Estimate:
    """Bytes on the disk while a GGUF is compared: llama.cpp's own f16 conversion and quantization of it.

    Of f16 and f32 there is a conversion only, and only where the comparison fails.
    """
    quantized = {} if quant in ("f16", "f32") else {"vendor's file": gguf_bytes(parameters, quant)}
    return Estimate({"vendor's f16 file": gguf_bytes(parameters, "f16"), **quantized})


def available(control_group: Path = _CONTROL_GROUP) -> Available:
    """This process's main memory: the machine's, or less where a container's limit is lower."""
    memory = psutil.virtual_memory()
    try:
        limit = int((control_group / "memory.max").read_text())
        counters = dict(line.split() for line in (control_group / "memory.stat").read_text().splitlines())
        # What the files' cache holds is given back when it is needed.
        used = int((control_group / "memory.current").read_text()) - int(counters.get("inactive_file", 0))
    except (OSError, ValueError):  # No control group, or the word "max": no limit.
        return Available(memory.total, memory.available)
    return Available(min(memory.total, limit), max(0, min(memory.available, limit - used)))


def usable_cores(control_group: Path = _CONTROL_GROUP) -> int:
    """The cores that this process may use: its own or a container's share of them, or OMP_NUM_THREADS."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, (control_group / "cpu.max").read_text().split())
    except (OSError, ValueError):  # No control group, or the word "max": no limit.
        return cores
    return min(cores, -(-quota // period))
