"""What this machine and its training stack can do, for `forge doctor`. Runs in a worker: it imports torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from forge.train.arithmetic import measured_arithmetic
from forge.train.hardware import Hardware, choose_hardware


@dataclass(frozen=True)
class LookRequest:
    """What a recipe asks for; by default nothing but to look."""

    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Gpu:
    """The GPU that would train; `has_bfloat16` counts no emulation."""

    name: str
    capability: str
    bytes_free: int
    bytes_total: int
    has_bfloat16: bool


@dataclass(frozen=True)
class FourBit:
    """bitsandbytes' version and the number type that a 4-bit product has; else why it does not work."""

    bitsandbytes: str | None = None
    computes_in: str | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Machine:
    """torch's version, the device that would train, and what 4-bit layers compute in."""

    torch: str
    cuda: str | None
    """The CUDA that torch was built with."""
    device: str
    compute: str
    processor: str
    threads: int
    gpu: Gpu | None
    has_flash_attention: bool
    four_bit: FourBit


def look(request: LookRequest) -> Machine:
    """Import torch and measure; takes some seconds."""
    import torch

    hardware = choose_hardware(request.device, request.dtype)
    return Machine(
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        device=hardware.device,
        compute=hardware.compute,
        processor=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        gpu=_gpu() if hardware.device == "cuda" else None,
        has_flash_attention=importlib.util.find_spec("flash_attn") is not None,
        four_bit=_four_bit(hardware),
    )


def _gpu() -> Gpu:
    import torch

    free, total = torch.cuda.mem_get_info()
    return Gpu(
        name=torch.cuda.get_device_name(),
        capability=".".join(map(str, torch.cuda.get_device_capability())),
        bytes_free=free,
        bytes_total=total,
        has_bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
    )


def _four_bit(hardware: Hardware) -> FourBit:
    import torch

    try:
        import bitsandbytes

        measured = measured_arithmetic(getattr(torch, hardware.compute), hardware.device, four_bit=True)
    except (ImportError, RuntimeError, AttributeError, NotImplementedError, OSError) as failure:
        return FourBit(why_not=str(failure).partition("\n")[0])
    return FourBit(str(bitsandbytes.__version__), measured.training)
