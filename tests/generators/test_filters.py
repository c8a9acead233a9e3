"""The filters of StyleGAN2's up-sampling."""

import pytest
import torch

from pyrewrite.generators.filters import separated


@pytest.mark.parametrize(
    ("vertical", "horizontal"), [([1, 3, 3, 1], [1, 3, 3, 1]), ([1, 2, 4, 9], [-1, 5, 2, 0]), ([2], [3])]
)
def test_factors_of_an_outer_product(vertical, horizontal):
    kernel = torch.outer(torch.tensor(vertical, dtype=torch.float32), torch.tensor(horizontal, dtype=torch.float32)) / 7
    v, h = separated(kernel)
    torch.testing.assert_close(torch.outer(torch.tensor(v), torch.tensor(h)), kernel.flip(0, 1))


@pytest.mark.parametrize(
    "kernel", [torch.eye(4), torch.zeros(4, 4), torch.tensor([[1.0, -1.0]]), torch.full((4, 4), torch.nan)]
)
def test_no_factors(kernel):
    assert separated(kernel) is None
