"""Where training runs and with which number types. Runs in a worker.

Device order is CUDA, MPS, CPU (A1); 16-bit is bfloat16 where the hardware has it, else float16 on a
GPU and float32 elsewhere (A2). Not covered: more than one GPU in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forge.errors import MissingToolError

_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Hardware:
    """Where training runs and with which 16-bit type; `autocast` is bf16, fp16 or empty."""

    device: str
    compute: str
    autocast: str


def choose_hardware(device: str, dtype: str) -> Hardware:
    """Resolve `auto`; raises `MissingToolError` when the asked device is not there."""
    import torch

    present = "cpu"
    if torch.cuda.is_available():
        present = "cuda"
    elif torch.backends.mps.is_available():
        present = "mps"
    if device not in ("auto", present, "cpu"):
        raise MissingToolError(
            f"train.device: {device} is not available here (this machine has: {present})",
            hint="set train.device: auto, or install the torch build for your GPU",
        )
    chosen = present if device == "auto" else device
    if dtype != "auto":
        return Hardware(chosen, _NAMES[dtype], dtype if chosen == "cuda" and dtype != "fp32" else "")
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
