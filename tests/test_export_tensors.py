"""Values on their way into a file: what is not finite is seen, in every type and wherever it stands."""

from __future__ import annotations

import pytest
import torch

from forge.export.tensors import are_finite

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), -float("nan")])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype, bad: float) -> None:
    """The first, one in the middle and the last, among values of both signs and of one."""
    for values in (torch.linspace(-3, 3, 999), torch.linspace(1, 3, 999), torch.linspace(-3, -1, 999)):
        for place in (0, 500, 998):
            broken = values.to(dtype).clone()
            broken[place] = bad
            assert not are_finite(broken)
            assert not are_finite(broken.reshape(27, 37))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_of_the_range_are_finite(dtype: torch.dtype) -> None:
    """The largest of either sign, the smallest beside zero, both zeros; and nothing at all."""
    limits = torch.finfo(dtype)
    ends = [limits.max, limits.min, limits.tiny, limits.smallest_normal / 4, 0.0, -0.0]
    for count in range(len(ends) + 1):
        assert are_finite(torch.tensor(ends[:count], dtype=dtype))
    assert are_finite(torch.tensor(-1.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_agrees_with_torch_on_every_pattern_of_sixteen_bits(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    told = [are_finite(patterns[place : place + 1]) for place in range(len(patterns))]
    assert told == torch.isfinite(patterns).tolist()
