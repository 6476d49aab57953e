"""What this machine and its training stack can do, for `forge doctor`. Runs in a worker: it imports torch."""

from __future__ import annotations

import importlib.util
from typing import Any

from forge.train.arithmetic import measured_arithmetic
from forge.train.hardware import Hardware, choose_hardware


def look() -> dict[str, Any]:
    """torch's version, the device that would train, and what 4-bit layers compute in.

    `four_bit` is the number type that a 4-bit product was measured to have; None where bitsandbytes does
    not work, with `why`.
    """
    import torch

    hardware = choose_hardware("auto", "auto")
    facts: dict[str, Any] = {
        "torch": str(torch.__version__),
        "built_for_cuda": torch.version.cuda,
        "device": hardware.device,
        "compute": hardware.compute,
        "threads": torch.get_num_threads(),
        "gpu": None,
        "flash_attention": importlib.util.find_spec("flash_attn") is not None,
    }
    if hardware.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "bytes_free": free,
            "bytes_total": total,
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "count": torch.cuda.device_count(),
        }
    return facts | _four_bits(hardware)


def _four_bits(hardware: Hardware) -> dict[str, Any]:
    """What bitsandbytes' 4-bit layer computes in, measured; `four_bit` is None where it does not work."""
    import torch

    try:
        import bitsandbytes

        measured = measured_arithmetic(getattr(torch, hardware.compute), hardware.device, four_bit=True)
    except (ImportError, RuntimeError, AttributeError, NotImplementedError, OSError) as failure:
        return {"bitsandbytes": None, "four_bit": None, "why": str(failure).partition("\n")[0]}
    return {"bitsandbytes": str(bitsandbytes.__version__), "four_bit": measured["training"], "why": ""}
