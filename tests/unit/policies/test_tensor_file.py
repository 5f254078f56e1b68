"""Whether weights are finite is read off their bits: for every data type what torch says of each number."""

from __future__ import annotations

import pytest
import torch

from policies.tensor_file import is_finite

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_ones_are(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    extremes = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.smallest_normal / 2], dtype=dtype)
    assert is_finite(extremes)
    assert is_finite(torch.ones((), dtype=dtype))
    assert is_finite(torch.zeros(0, 3, dtype=dtype))
    assert is_finite(torch.ones(3, 5, dtype=dtype).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 300_000, -1])
def test_one_that_is_not_is_found_wherever_it_is(dtype: torch.dtype, bad: float, at: int) -> None:
    tensor = torch.full((700, 1000), -1.5, dtype=dtype)
    tensor.view(-1)[at] = bad
    assert not is_finite(tensor)
    assert not is_finite(tensor.T)


@pytest.mark.parametrize(("dtype", "integer"), [(torch.float16, torch.int16), (torch.bfloat16, torch.int16)])
def test_every_16_bit_pattern_is_told_as_torch_tells_it(dtype: torch.dtype, integer: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(integer).view(dtype)
    finite = patterns[patterns.isfinite()]
    assert is_finite(finite)
    for pattern in patterns[~patterns.isfinite()]:
        assert not is_finite(pattern)
