"""What the base's layers compute in is what was asked for, on every processor, and it is measured."""

from __future__ import annotations

import pytest

from forge.train.arithmetic import Arithmetic, compute_as_asked, measured_arithmetic
from forge.train.hardware import Hardware, choose_hardware
from forge.train.model import BaseSettings, arithmetic_of

pytestmark = pytest.mark.training


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_layer_computes_as_asked(name: str, four_bit: bool) -> None:
    """A6: in evaluation too, where bitsandbytes takes bfloat16 by itself on some processors."""
    import torch

    measured = measured_arithmetic(getattr(torch, name), "cpu", four_bit=four_bit)
    assert measured == Arithmetic(name, name)


def test_what_is_measured_is_what_the_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what was asked of it: a layer that goes its own way in evaluation is reported."""
    import bitsandbytes
    import torch

    own = bitsandbytes.nn.Linear4bit.forward

    def stray(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return own(layer, x if layer.training else x.bfloat16()).to(x.dtype)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", stray)
    measured = measured_arithmetic(torch.float32, "cpu", four_bit=True)
    assert measured == Arithmetic("float32", "bfloat16")


def test_float16_hardware_computes_4_bit_layers_in_float32() -> None:
    """A2, pitfall 26."""
    turing = Hardware("cpu", "float16", "fp16")
    assert arithmetic_of(turing, BaseSettings("qlora")) == Arithmetic("float32", "float32")


def test_the_switch_is_one_of_the_installed_bitsandbytes() -> None:
    """Where an upgrade renames it, this says so on every processor."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 64)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    compute_as_asked(layer)
    assert layer.support_avx512bf16_for_cpu is False


def test_auto_takes_bfloat16_only_where_torch_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATEN_CPU_CAPABILITY turns it off, which is how another processor is tried here."""
    import torch

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for capability, compute in (("AVX512", "bfloat16"), ("AVX2", "float32"), ("DEFAULT", "float32")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda named=capability: named)
        assert choose_hardware("cpu", "auto").compute == compute
