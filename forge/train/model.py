"""The base as it is trained: quantized or not, with which attention. Runs in a worker.

One compute type drives the quantized layers and autocast alike (pitfall 19). An 8-bit base has its other
weights in float32 and no autocast: in 16 bits its loss is not a number (A4).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import DataError, MissingToolError
from forge.model.loading import configuration_in
from forge.recipe.training import Train
from forge.train.arithmetic import Arithmetic, compute_as_asked, measured_arithmetic
from forge.train.hardware import Hardware
from forge.train.ranks import local_rank


@dataclass(frozen=True)
class BaseSettings:
    """How a base is loaded for training and for evaluation; the names are the recipe's."""

    method: str
    trust_remote_code: bool = False
    seed: int = 0
    four_bit_type: str = "nf4"
    double_quantization: bool = True
    quant_storage: str = "uint8"
    attention: str = "auto"
    is_shared: bool = False
    """Whether its parts are shared among devices, which cuts it up after it was loaded."""

    @classmethod
    def of(cls, section: Train | None, *, trust_remote_code: bool) -> BaseSettings:
        """As the recipe's section has it; without one the base is held as it is."""
        if section is None:
            return cls("lora", trust_remote_code)
        return cls(
            section.method,
            trust_remote_code,
            section.seed,
            section.four_bit_type,
            section.double_quantization,
            section.quant_storage,
            section.attention,
            section.strategy != "ddp",
        )

    @property
    def is_quantized(self) -> bool:
        return self.method in ("qlora", "int8")


def load_base(directory: Path, hardware: Hardware, settings: BaseSettings) -> Any:
    """The base for training; quantized where the method is qlora (4 bits) or int8.

    Raises `MissingToolError` where the attention's package is not installed, `DataError` where the family
    does not have it.
    """
    import torch
    import transformers

    transformers.set_seed(settings.seed)
    options: dict[str, object] = {
        "config": configuration_in(directory, trust_remote_code=settings.trust_remote_code),
        "dtype": getattr(torch, hardware.compute),
        "trust_remote_code": settings.trust_remote_code,
    }
    if hardware.autocast == "fp16" or settings.method in ("int8", "full"):
        # Gradients of float16 weights under float16 autocast cannot be unscaled; updates below a
        # thousandth of a weight are lost in 16 bits (pitfall 41).
        options["dtype"] = torch.float32
    if settings.is_quantized:
        options["quantization_config"] = _quantization(hardware, settings)
    if settings.attention != "auto":
        options["attn_implementation"] = settings.attention
    if hardware.device != "cpu" and not settings.is_shared:
        options["device_map"] = {"": local_rank() if hardware.device == "cuda" else hardware.device}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(directory), **options)
    except ImportError as error:
        if settings.attention == "auto":
            raise
        raise MissingToolError(f"train.attention: {error}", hint="set train.attention: auto") from error
    except ValueError as error:
        if settings.attention == "auto" or "attention" not in str(error).lower():
            raise
        raise DataError(f"train.attention: {error}", hint="set train.attention: auto") from error
    model.config.use_cache = False
    compute_as_asked(model)
    return model


def _quantization(hardware: Hardware, settings: BaseSettings) -> Any:
    import torch
    import transformers

    if settings.method == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.four_bit_type,
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_quant_storage=getattr(torch, settings.quant_storage),
        bnb_4bit_compute_dtype=getattr(torch, _compute_type(hardware, settings)),
    )


def arithmetic_of(hardware: Hardware, settings: BaseSettings) -> Arithmetic:
    """What the layers of `load_base` multiply in, in training and in evaluation, as measured.

    Of an 8-bit base it is bitsandbytes' own scheme: int8 products, outliers in float16.
    """
    import torch

    if settings.method == "int8":
        return Arithmetic("int8", "int8")
    compute = getattr(torch, _compute_type(hardware, settings))
    return measured_arithmetic(compute, hardware.device, four_bit=settings.method == "qlora")


def _compute_type(hardware: Hardware, settings: BaseSettings) -> str:
    """Quantized layers compute in float32 where bfloat16 is missing: float16 overflows (A2, pitfall 26)."""
    if settings.method == "qlora" and hardware.compute == "float16":
        return "float32"
    return hardware.compute
