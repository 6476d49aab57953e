"""The base as it is trained: which device and number types, quantized or not, with its LoRA.

Runs in a worker. Device order is CUDA, MPS, CPU (A1); 16-bit is bfloat16 where the hardware has
it, else float16 on a GPU and float32 elsewhere (A2). One compute type drives the quantized layers
and autocast alike (pitfall 19). Not covered: 8-bit bases, and more than one GPU in one process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import DataError, MissingToolError
from forge.model.loading import configuration_in
from forge.train.arithmetic import compute_as_asked, measured_arithmetic

_HEAD = "lm_head"
# What peft.utils.constants.EMBEDDING_LAYER_NAMES has.
_PEFT_TIES = {"embed_tokens", _HEAD}


@dataclass(frozen=True)
class Hardware:
    """Where training runs and with which 16-bit type; `autocast` is bf16, fp16 or empty."""

    device: str
    compute: str
    autocast: str


def choose_hardware(device: str, dtype: str) -> Hardware:
    """Resolve `auto`; raises `MissingToolError` when the asked device is not there."""
    import torch

    found = "cpu"
    if torch.cuda.is_available():
        found = "cuda"
    elif torch.backends.mps.is_available():
        found = "mps"
    if device not in ("auto", found, "cpu"):
        raise MissingToolError(
            f"train.device: {device} is not available here (found: {found})",
            hint="set train.device: auto, or install the torch build for your GPU",
        )
    chosen = found if device == "auto" else device
    if dtype != "auto":
        names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        return Hardware(chosen, names[dtype], dtype if chosen == "cuda" and dtype != "fp32" else "")
    if chosen == "cuda":
        # Emulated bfloat16 (Turing and older) is slower than float16, so it does not count (A2).
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware(chosen, "bfloat16" if native else "float16", "bf16" if native else "fp16")
    native = chosen == "cpu" and _has_bfloat16(torch)
    return Hardware(chosen, "bfloat16" if native else "float32", "")


def _has_bfloat16(torch: Any) -> bool:
    """Whether the processor multiplies bfloat16 itself and torch may use it there.

    oneDNN calls bfloat16 supported wherever it can emulate it, which is several times slower.
    """
    masked = not torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # ATEN_CPU_CAPABILITY
    return not masked and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_base(
    directory: str, hardware: Hardware, *, quantize: bool, trust_remote_code: bool, seed: int
) -> Any:
    """The base for training; with `quantize` its linear layers are NF4, doubly quantized (QLoRA)."""
    import torch
    import transformers

    transformers.set_seed(seed)
    compute = getattr(torch, hardware.compute)
    configuration = configuration_in(Path(directory), trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {
        "config": configuration, "dtype": compute, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if hardware.autocast == "fp16":
        # Gradients of float16 weights under float16 autocast cannot be unscaled.
        options["dtype"] = torch.float32
    if quantize:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, _compute_type(hardware, quantize=True)),
        )
    if hardware.device != "cpu":
        options["device_map"] = {"": 0 if hardware.device == "cuda" else hardware.device}
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    model.config.use_cache = False
    compute_as_asked(model)
    return model


def arithmetic_of(hardware: Hardware, *, quantize: bool) -> Mapping[str, str]:
    """What the layers of `load_base` multiply in, in training and in evaluation, as measured.

    Under autocast the layers themselves hold another type; what it turns the product into is its name.
    """
    import torch

    compute = getattr(torch, _compute_type(hardware, quantize=quantize))
    return measured_arithmetic(compute, hardware.device, four_bit=quantize)


def _compute_type(hardware: Hardware, *, quantize: bool) -> str:
    """Quantized layers compute in float32 where bfloat16 is missing: float16 overflows (A2, pitfall 26)."""
    return "float32" if quantize and hardware.compute == "float16" else hardware.compute


def with_lora(model: Any, lora: Mapping[str, Any], *, quantize: bool, checkpointing: bool) -> Any:
    """The model with fresh LoRA layers in float32, everything else frozen.

    An embedding that the base ties to its output layer stays tied when it is trained whole.
    Raises `DataError` when the target names match no layer, listing what there is, or when such an
    embedding is to get factors of its own.
    """
    import peft

    tied = _tied_names(model)
    _refuse_factors(lora["targets"], tied)
    whole = _trained_whole(lora["modules_to_save"], tied)
    if quantize:
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    targets: str | list[str] = lora["targets"]
    configuration = peft.LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules="all-linear" if targets in ("auto", "all-linear") else list(targets),
        use_rslora=lora["rslora"],
        use_dora=lora["dora"],
        modules_to_save=whole or None,
        ensure_weight_tying=bool(tied) and _HEAD in whole,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, configuration)
    except ValueError as error:
        names = linear_names(model)
        raise DataError(
            f"train.lora.targets: {error}", hint=f"the linear layers are {', '.join(names)}"
        ) from error


def _tied_names(model: Any) -> Collection[str]:
    """Where the embedding and the output layer are, where the base has one tensor for both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return ()  # whatever the configuration says
    tied = {id(embedding), id(head)}
    return {name for name, module in model.named_modules() if id(module) in tied}


def _refuse_factors(targets: str | Sequence[str], tied: Collection[str]) -> None:
    """Factors would move one of two tied tensors alone: some families have no place for a second."""
    named = () if isinstance(targets, str) else targets
    if wrong := sorted(name for name in named if any(f".{one}".endswith(f".{name}") for one in tied)):
        raise DataError(
            f"train.lora.targets: {', '.join(wrong)}: the base ties its output layer to the embedding",
            hint="name it in train.lora.modules_to_save, where the two are trained as one, or leave it out",
        )


def _trained_whole(named: Sequence[str], tied: Collection[str]) -> list[str]:
    """The modules to save, the output layer for an embedding that is tied to it: peft then ties both.

    peft matches the end of a name, and ties an embedding of no other name.
    """
    others = [name for name in named if not any(one.endswith(name) for one in tied)]
    if len(others) == len(named):
        return list(named)
    if not {_last(one) for one in tied} <= _PEFT_TIES:
        raise DataError(
            "train.lora.modules_to_save: the base ties its output layer to the embedding, and peft would "
            f"train them apart: it knows {' and '.join(sorted(_PEFT_TIES))}, "
            f"these are {', '.join(sorted(tied))}",
            hint="leave both out",
        )
    return [*others, _HEAD]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def linear_names(model: Any) -> Sequence[str]:
    """Short names of the layers that LoRA can adapt."""
    import torch

    return sorted(
        {
            _last(name)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        }
    )


def trainable_to_float32(model: Any) -> None:
    """Keep adapter weights in float32 whatever the trainer made of them.

    trl casts the adapters of a quantized base to bfloat16, but a resumed run reloads them as
    float32: the two would differ. float32 from the start makes resuming exact.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
