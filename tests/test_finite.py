"""all_finite against torch.isfinite."""

import math

import pytest
import torch

from pyrewrite._finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5, 7), (2, 3, 33, 65)])
def test_finite_numbers(shape, dtype):
    x = (100 * torch.randn(shape)).to(dtype)
    assert all_finite(x) is True
    assert all_finite(x.t() if x.ndim == 2 else x[..., ::2] if x.ndim else x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1000, 4288])
def test_one_that_is_not(value, dtype, at):
    x = torch.randn(1, 4289, dtype=dtype)
    x[0, at] = value
    assert not all_finite(x)
    assert not all_finite(x.t())
    assert all_finite(x[:, at + 1 :])
    assert not all_finite(torch.tensor(value, dtype=dtype, requires_grad=True))


def test_the_largest_numbers_are_finite():
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.tensor([largest, largest, -largest]))
    assert all_finite(torch.tensor([-math.ulp(0.0)], dtype=torch.float64))
