"""The small parts of modulated layers against plain torch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from pyrewrite.generators.filters import upsampled_by_two
from pyrewrite.ops.convolution import prepare_conv3x3, prepare_upconv3x3
from pyrewrite.ops.modulation import colours, colours_kernel_takes, demodulated_scale, wide_linear


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("b", "i", "o"), [(1, 1, 1), (3, 17, 5), (2, 192, 64), (0, 8, 4), (2, 4, 0), (1, 0, 3)])
def test_wide_linear(b, i, o):
    x, weight, bias = randn(b, i), randn(o, i, seed=1), randn(o, seed=2)
    truth = F.linear(0.3 * x.double(), weight.double(), 0.01 * bias.double())
    found = wide_linear(x, weight, bias, 0.3, 0.01)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-7, atol=1e-7)
    strided = wide_linear(x.t().contiguous().t(), weight.t().contiguous().t(), bias, 0.3, 0.01)
    assert torch.equal(strided, found)
    for n in range(b):
        assert torch.equal(wide_linear(x[n : n + 1], weight, bias, 0.3, 0.01), found[n : n + 1])


def test_wide_linear_of_other_kinds():
    x, weight, bias = randn(2, 5), randn(3, 5), randn(3)
    wide = wide_linear(x.double(), weight.double(), bias.double(), 0.5)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide_linear(x, weight, bias, 0.5).double(), wide, rtol=1e-6, atol=1e-6)
    leaf = weight.clone().requires_grad_()
    wide_linear(x, leaf, bias, 0.5).sum().backward()
    torch.testing.assert_close(leaf.grad, 0.5 * x.sum(0).expand(3, 5))
    assert wide_linear(torch.full((1, 5), math.nan), weight, bias, 0.5).isnan().all()
    with pytest.raises(ValueError, match=r"\(2, 5\), \(3, 4\), \(3,\)"):
        wide_linear(x, weight[:, :4], bias, 0.5)


@pytest.mark.parametrize("prepare", [prepare_conv3x3, prepare_upconv3x3])
@pytest.mark.parametrize(("b", "i", "o"), [(1, 16, 16), (3, 48, 80), (0, 16, 32)])
def test_demodulated_scale(prepare, b, i, o):
    weight, style = randn(o, i, 3, 3), randn(b, i, seed=1)
    filters = 0.1 * style.double()[:, None, :, None, None] * weight.double()
    truth = 0.2 / (filters.square().sum((2, 3, 4)) + 1e-8).sqrt()
    prepared = prepare(weight)
    found = demodulated_scale(weight, style, 0.1, 1e-8, 2.0, prepared)
    torch.testing.assert_close(found.double(), truth, rtol=3e-7, atol=0)
    torch.testing.assert_close(demodulated_scale(weight, style, 0.1, 1e-8, 2.0).double(), truth, rtol=3e-7, atol=0)
    for n in range(b):
        assert torch.equal(demodulated_scale(weight, style[n : n + 1], 0.1, 1e-8, 2.0, prepared), found[n : n + 1])


def test_demodulated_scale_of_other_kinds():
    weight, style = randn(16, 16, 3, 3), randn(2, 16, seed=1)
    prepared = prepare_conv3x3(weight)
    assert (demodulated_scale(weight, torch.zeros(1, 16), 0.1, 1e-8, 1.0, prepared) == 0.1 / 1e-4).all()
    leaf = style.clone().requires_grad_()
    demodulated_scale(weight, leaf, 0.1, 1e-8, 1.0, prepared).sum().backward()
    assert leaf.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"\(16, 16, 3, 3\) and \(2, 15\)"):
        demodulated_scale(weight, style[:, :15], 0.1, 1e-8)
    with pytest.raises(ValueError, match="prepared holds 3 numbers, expected 4352"):
        demodulated_scale(weight, style, 0.1, 1e-8, 1.0, torch.zeros(3))


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize(
    ("b", "c", "i", "h", "w"),
    [(1, 3, 16, 2, 2), (3, 3, 48, 6, 10), (2, 1, 32, 4, 4), (1, 3, 16, 64, 48), (0, 3, 16, 4, 4)],
)
def test_colours(b, c, i, h, w, clamp, skipped):
    x, matrix, bias = randn(b, i, h, w), randn(b, c, i, seed=1), randn(c, seed=2)
    kernel = randn(4, 4, seed=3)  # no symmetry: a flipped filter would show
    skip = randn(b, c, h // 2, w // 2, seed=4) if skipped else None
    truth = torch.bmm(matrix.double(), x.double().flatten(2)).unflatten(2, (h, w)) + bias[:, None, None].double()
    if clamp is not None:
        truth = truth.clamp(-clamp, clamp)
    if skipped and b:
        truth = truth + upsampled_by_two(skip.double(), kernel.double())
    assert colours_kernel_takes(x, matrix, bias, skip, kernel)
    found = colours(x, matrix, bias, clamp, skip, kernel)
    assert found.shape == (b, c, h, w)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=3e-5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for n in range(b):
            one = [t if t is None else t[n : n + 1] for t in (x, matrix, skip)]
            assert torch.equal(colours(one[0], one[1], bias, clamp, one[2], kernel), found[n : n + 1])
    finally:
        torch.set_num_threads(threads)


def test_colours_of_bad_values_and_shapes():
    x, matrix, bias, skip, kernel = randn(1, 16, 4, 4), randn(1, 3, 16), randn(3), randn(1, 3, 2, 2), randn(4, 4)
    x[0, 3, 1, 2] = math.nan
    bad = colours(x, matrix, bias, 0.5, skip, kernel).isnan()
    assert bad[:, :, 1, 2].all()
    assert bad.sum() == 3
    for other in (x.double(), x[:, :15], x.clone().requires_grad_()):
        assert not colours_kernel_takes(other, matrix, bias, None, None)
    assert not colours_kernel_takes(x, matrix, bias, skip, randn(3, 3))
    for given in ((matrix[:, :, :8], bias, skip), (matrix, bias[:2], skip), (matrix, bias, skip[:, :, :1])):
        with pytest.raises(ValueError, match="colours takes B x I x H x W"):
            colours(x, given[0], given[1], None, given[2], kernel)
