"""second_moment_: every implementation against float64, on every layout."""

from __future__ import annotations

import importlib

import pytest
import torch

from pyrewrite.ops import MissingKernelError, _library, second_moment, second_moment_, second_moment_ref

FAMILIES = {"cuda": 0, "cuda simt": 1, "cuda sm80": 2}  # by rule, and the kernels of every family (params.h)
CUDA = [pytest.param(name, marks=pytest.mark.cuda) for name in FAMILIES]
IMPLS = ["cpu", "torch", *CUDA]
KINDS = [torch.float32, torch.float16, torch.bfloat16]
# Around the widths of register blocks and the number of rows in a panel (96).
ROWS = [(1, 1), (3, 1), (2, 5), (95, 16), (96, 17), (193, 31), (1000, 64), (700, 129), (300, 161), (513, 250)]
MAPS = [(1, 1, 1, 1), (2, 3, 4, 5), (3, 64, 16, 16), (5, 33, 7, 9), (2, 130, 20, 20), (300, 4, 1, 1), (1, 8, 300, 1)]


OP = importlib.import_module("pyrewrite.ops.second_moment")  # the function has the name of its module


def add(total: torch.Tensor, x: torch.Tensor, impl: str | None, **settings) -> torch.Tensor:
    """second_moment_ with an implementation of IMPLS."""
    before = OP._CUDA_FAMILY
    OP._CUDA_FAMILY = FAMILIES.get(impl, before)
    try:
        return second_moment_(total, x, impl="cuda" if impl in FAMILIES else impl, **settings)
    except RuntimeError as error:
        if "were asked for" in str(error):
            pytest.skip(str(error))
        raise
    finally:
        OP._CUDA_FAMILY = before


def moment_of(x: torch.Tensor, on_device=lambda t: t, impl: str | None = None, **settings) -> torch.Tensor:
    """x lies on the device already."""
    total = on_device(torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64))
    assert add(total, x, impl, **settings) is total
    return total.cpu()


def cut() -> float:
    """How much the GPU's tensor cores lose when they cut a sum, beside 9.0's: before it they keep a bit less."""
    return 1 if _library.cuda_report()["devices"][0]["capability"] >= (9, 0) else 2


def check(x: torch.Tensor, impl: str | None, on_device=lambda t: t, bound: float = 1e-6) -> None:
    result, x = moment_of(x, on_device, impl=impl), x.cpu()
    slack = 1e-7
    if impl in FAMILIES:
        # On tensor cores a factor of float32 is two numbers of 11 bits, and the product of the two small ones is left
        # out: 2^-21 of a product in the worst case, which many rows average out. Of 16 bits every product is cut.
        times = cut() if x.dtype != torch.float32 else 1
        slack, bound = 5e-7 * times, bound * times
    truth = second_moment_ref(x)
    assert torch.equal(result, result.T)
    rows = x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    baseline = rows.float().T @ rows.float()
    error, usual = ((m.double() - truth).norm() / truth.norm() for m in (result, baseline))
    assert error <= 2 * usual + slack
    assert error < bound


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(shape, impl, on_device):
    torch.manual_seed(0)
    n, d = shape
    check(on_device(torch.randn(n, d) + 0.5), impl, on_device)
    check(on_device(torch.randn(d, n)).T, impl, on_device)
    check(on_device(torch.randn(2 * n, d + 3))[::2, 1 : d + 1], impl, on_device)
    check(on_device(torch.randn(n, 2 * d))[:, ::2], impl, on_device)
    # Equal rows: every rounding goes the same way.
    check(on_device(torch.randn(1, d)).expand(n, d), impl, on_device, bound=3e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_maps(shape, impl, on_device):
    torch.manual_seed(0)
    b, c, h, w = shape
    check(on_device(torch.randn(shape)), impl, on_device)
    check(on_device(torch.randn(shape).contiguous(memory_format=torch.channels_last)), impl, on_device)
    check(on_device(torch.randn(2 * b, c, h, w))[::2], impl, on_device)  # strides between images
    check(on_device(torch.randn(b, c, h + 2, w + 3))[:, :, 1 : h + 1, 2 : w + 2], impl, on_device)
    check(on_device(torch.randn(b, c, h, w + 4))[:, :, :, 4:], impl, on_device)
    check(on_device(torch.randn(b, c, w, h)).transpose(2, 3), impl, on_device)
    check(on_device(torch.randn(b, 2 * c, h, w))[:, ::2], impl, on_device)
    check(on_device(torch.randn(b, h + 1, w + 1, c)).permute(0, 3, 1, 2)[:, :, 1:, :w], impl, on_device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", KINDS)
def test_types(dtype, impl, on_device):
    torch.manual_seed(0)
    for shape in ((300, 20), (300, 24), (129, 130), (2, 20, 9, 7), (2, 24, 8, 8), (1, 70, 2, 4)):
        x = torch.randn(shape).to(dtype)
        check(on_device(x), impl, on_device)
        if x.ndim == 4:
            check(on_device(x.contiguous(memory_format=torch.channels_last)), impl, on_device)
        else:  # aligned rows of an odd width
            check(on_device(x)[:, : shape[1] - 3], impl, on_device)
    tiny = torch.full((4, 2), 3e-7).to(dtype)  # subnormal in half
    large = torch.full((4, 2), 300.0).to(dtype)  # its square overflows half
    for x in (tiny, large):
        result = moment_of(on_device(x), on_device, impl=impl)
        torch.testing.assert_close(result, second_moment_ref(x), rtol=1e-6, atol=0)


@pytest.mark.skipif(_library.native_problem() != "", reason="needs the binary module")
def test_every_half_is_widened_exactly():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        kept = values[values.isfinite() & (values.float().abs() < 1e18) & (values.float().abs() > 1e-18)]
        one_by_one = kept.reshape(-1, 1)
        for value in (one_by_one[::997], one_by_one):
            torch.testing.assert_close(moment_of(value, impl="cpu"), second_moment_ref(value), rtol=1e-6, atol=0)


def test_float64_in_torch():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(moment_of(x), second_moment_ref(x), rtol=1e-13, atol=1e-13)
    with pytest.raises(TypeError, match=r"second_moment_: impl='cpu' takes float32, float16, bfloat16, got float64"):
        moment_of(x, impl="cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 4, 4), (2, 5, 0, 4), (2, 5, 4, 0)], ids=str)
def test_no_rows(shape, impl, on_device):
    total = on_device(torch.full((5, 5), 2.0, dtype=torch.float64))
    add(total, on_device(torch.zeros(shape)), impl)
    assert (total == 2).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_adds_to_what_is_there(impl, on_device):
    torch.manual_seed(0)
    x = on_device(torch.randn(700, 9))
    once = moment_of(x, on_device, impl=impl)
    total = on_device(once.clone())
    version = total._version
    add(total, x, impl)
    assert total._version > version
    torch.testing.assert_close(total.cpu(), 2 * once, rtol=1e-15, atol=0)
    for wide, view in (((9, 18), lambda m: m[:, ::2]), ((10, 11), lambda m: m.T[1:10, :9])):
        storage = on_device(torch.zeros(wide, dtype=torch.float64))
        add(view(storage), x, impl)
        assert torch.equal(view(storage).cpu(), once)
        view(storage).zero_()
        assert (storage == 0).all()
    # A moment that is not symmetric is the caller's matter.
    slanted = on_device(torch.arange(81.0, dtype=torch.float64).reshape(9, 9))
    add(slanted, x, impl)
    torch.testing.assert_close(
        slanted.cpu(), once + torch.arange(81.0, dtype=torch.float64).reshape(9, 9), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_seen(bad, impl, on_device):
    torch.manual_seed(0)
    for x in (torch.rand(600, 40) + 0.1, torch.rand(2, 40, 15, 20) + 0.1):
        x[1, 7] = bad
        result = moment_of(on_device(x), on_device, impl=impl)
        seen = torch.zeros(40, 40, dtype=torch.bool)
        seen[7] = seen[:, 7] = True
        assert torch.equal(~result.isfinite(), seen)
        assert torch.equal(result.isnan(), second_moment_ref(x).isnan())


@pytest.mark.parametrize("impl", IMPLS)
def test_error_does_not_grow_with_the_rows(impl, on_device):
    """2^16 rows with a mean: float32 totals would lose digits."""
    torch.manual_seed(0)
    x = torch.rand(1 << 16, 24)
    truth = second_moment_ref(x)
    error = (moment_of(on_device(x), on_device, impl=impl) - truth).norm() / truth.norm()
    assert error < (3e-7 if impl in FAMILIES else 3e-8)  # tensor cores cut their sums, all in one direction


@pytest.mark.parametrize("impl", CUDA)
@pytest.mark.parametrize("shape", [(5000, 40), (3, 200, 32, 32)], ids=str)
def test_same_bits_every_time(shape, impl, on_device):
    torch.manual_seed(0)
    x = on_device(torch.randn(shape))
    assert torch.equal(moment_of(x, on_device, impl=impl), moment_of(x, on_device, impl=impl))


@pytest.mark.parametrize("impl", CUDA)
def test_squares_beyond_float32(impl, on_device):
    """Their float32 sums overflow; they are summed again in float64."""
    x = torch.rand(300, 5) + 0.5
    x[:, 2] *= 1e25
    result = moment_of(on_device(x), on_device, impl=impl)
    torch.testing.assert_close(result, second_moment_ref(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", CUDA)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("d", [8, 64, 72, 128, 136, 192, 200, 256, 264, 328, 520])
def test_widths(d, dtype, impl, on_device):
    """Around the sides of the tiles that are computed, in both layouts; rows that end within a slice of 64."""
    if dtype == torch.float16 and d > 136:
        pytest.skip("as bfloat16")
    torch.manual_seed(0)
    check(on_device(torch.rand(333, d).to(dtype)), impl, on_device)
    check(on_device(torch.rand(2, d, 12, 16).to(dtype)), impl, on_device)
    padded = torch.rand(3, 20, 8, d + 8).to(dtype)  # images, lines, pixels apart, and channels that are not used
    check(on_device(padded).permute(0, 3, 1, 2)[1:, :d, :16], impl, on_device)


@pytest.mark.parametrize("impl", CUDA)
@pytest.mark.parametrize("layout", ["rows", "NCHW"])
def test_channels_of_different_size(layout, impl, on_device):
    """Every entry is as exact as its own channels allow, not as the largest ones do."""
    torch.manual_seed(0)
    shape = (700, 136) if layout == "rows" else (3, 136, 16, 16)
    x = torch.rand(shape) + 0.1
    size = 10.0 ** ((torch.arange(136) * 7) % 25 - 12)
    x *= size if layout == "rows" else size[:, None, None]
    truth = second_moment_ref(x)
    assert ((moment_of(on_device(x), on_device, impl=impl) - truth).abs() / truth).max() < 2e-6


@pytest.mark.parametrize("impl", CUDA)
def test_values_far_beyond_the_first_rows(impl, on_device):
    """Scales are chosen from some of the rows. What exceeds them is computed again; what they never saw is not lost."""
    torch.manual_seed(0)
    x = torch.rand(4000, 12)
    late = torch.arange(4000) % 100 == 50
    x[:, 3] *= 1e-3
    x[late, 3] = 1e4  # ten million times the rest
    x[:, 5] = 0
    x[late, 5] = torch.rand(int(late.sum()))  # nothing in most rows
    x[:, 7] *= torch.where(late, 1.0, 1e-4)
    truth = second_moment_ref(x)
    result = moment_of(on_device(x), on_device, impl=impl)
    assert ((result - truth).abs() / truth).max() < 2e-6


@pytest.mark.parametrize("impl", CUDA)
@pytest.mark.parametrize("layout", ["rows", "channels_last", "NCHW", "sliced"])
def test_tf32(layout, impl, on_device):
    torch.manual_seed(0)
    if layout == "rows":
        x = on_device(torch.rand(2000, 136))
    elif layout == "sliced":
        x = on_device(torch.rand(3, 64, 18, 23))[:, :, 1:, :21]
    else:
        x = torch.rand(3, 200, 16, 12)
        x = on_device(x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x)
    truth = second_moment_ref(x.cpu())
    result = moment_of(x, on_device, impl=impl, precision="tf32")
    assert torch.equal(result, result.T)
    error = (result - truth).norm() / truth.norm()
    assert error < 3e-5  # the rounding of the factors, to nearest: much of it averages out
    if impl == "cuda" and _library.cuda_report()["devices"][0]["capability"] >= (8, 0):
        assert error > 1e-6  # or it was not TF32, which older GPUs do not have


@pytest.mark.parametrize("impl", CUDA)
@pytest.mark.parametrize("shape", [(40_000, 8), (1, 64, 200, 200)], ids=str)
def test_long_sums(shape, impl, on_device):
    """More rows to a block than a float32 sum takes: the workspace is added to."""
    x = torch.rand(shape)
    for precision, bound in (("fp32", 3e-7), ("tf32", 3e-6 * cut())):
        result, truth = moment_of(on_device(x), on_device, impl=impl, precision=precision), second_moment_ref(x)
        assert (result - truth).norm() / truth.norm() < bound


@pytest.mark.parametrize("impl", IMPLS)
def test_error_against_that_of_torch(impl, on_device):
    """The moment of non-negative rows, whose float32 sums lose digits, is ten times as exact as x.T @ x."""
    torch.manual_seed(0)
    x = torch.randn(1 << 15, 48).abs()
    truth = second_moment_ref(x)
    error, usual = (
        (m.double() - truth).norm() / truth.norm() for m in (moment_of(on_device(x), on_device, impl=impl), x.T @ x)
    )
    assert error < {"cpu": usual / 10, "torch": usual}.get(impl, 3e-7)  # tensor cores may cut their sums


def test_lowered_torch_precision_is_not_taken_over():
    torch.manual_seed(0)
    x = torch.randn(500, 64)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        check(x, "torch")
    finally:
        torch.set_float32_matmul_precision(precision)


def test_threads_agree():
    torch.manual_seed(0)
    x = torch.randn(3000, 33)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5, 64):
            torch.set_num_threads(count)
            check(x, "cpu")
            assert torch.equal(moment_of(x, impl="cpu"), moment_of(x, impl="cpu"))
    finally:
        torch.set_num_threads(threads)


M = torch.zeros(3, 3, dtype=torch.float64)


@pytest.mark.parametrize("impl", [None, "cpu", "torch", "cuda"])
@pytest.mark.parametrize(
    ("moment", "x", "error", "message"),
    [
        (M, torch.zeros(3), ValueError, r"x must be rows N x d or maps B x d x H x W, got shape \(3,\)"),
        (M, torch.zeros(2, 3, 4), ValueError, r"x must be rows N x d or maps B x d x H x W, got shape \(2, 3, 4\)"),
        (M, torch.zeros(4, 0), ValueError, r"x must have at least one channel, got shape \(4, 0\)"),
        (M, torch.zeros(4, 2), ValueError, r"moment must be 2 x 2 for x of shape \(4, 2\), got \(3, 3\)"),
        (M[:1].expand(3, 3), torch.zeros(4, 3), ValueError, r"moment is an expanded tensor: its elements share memory"),
        (M.float(), torch.zeros(4, 3), TypeError, r"moment must be float64, got float32"),
        (
            M,
            torch.zeros(4, 3, dtype=torch.int64),
            TypeError,
            r"x must be float32, float16, bfloat16 or float64, got int64",
        ),
        (M, torch.zeros(4, 3, dtype=torch.complex64), TypeError, r"x must be float32, .* got complex64"),
        (M, torch.zeros(4, 3, device="meta"), ValueError, r"moment and x must be on one device, got cpu and meta"),
    ],
)
def test_refusals(moment, x, error, message, impl):
    with pytest.raises(error, match=message):
        second_moment_(moment, x, impl=impl)


def test_more_refusals(monkeypatch):
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="precision must be 'fp32' or 'tf32', got 'fp16'"):
        second_moment_(M, x, precision="fp16")
    with pytest.raises(ValueError, match="impl must be None or one of 'cuda', 'cpu', 'torch', got 'CPU'"):
        second_moment_(M, x, impl="CPU")
    with pytest.raises(RuntimeError, match="second_moment_ adds in place and has no gradient"):
        second_moment_(M, x.clone().requires_grad_())
    monkeypatch.setattr(_library, "_load", lambda: (None, "the binary module is missing"))
    with pytest.raises(MissingKernelError, match="second_moment_: the binary module is missing"):
        second_moment_(M, x)


@pytest.mark.skipif(not _library.cuda_report()["problem"], reason="a CUDA kernel can run here")
def test_cuda_that_is_not_there_raises():
    with pytest.raises(MissingKernelError, match="second_moment_: impl='cuda' cannot run: "):
        second_moment_(M.clone(), torch.zeros(4, 3), impl="cuda")


def test_opcheck():
    torch.manual_seed(0)
    for x in (torch.randn(6, 3), torch.randn(2, 3, 4, 5)):
        torch.library.opcheck(torch.ops.pyrewrite.second_moment_, (M.clone(), x, "fp32", None))
        torch.library.opcheck(torch.ops.pyrewrite.second_moment, (x, "fp32", None))
        leaf = x.double().requires_grad_()
        torch.library.opcheck(torch.ops.pyrewrite.second_moment, (leaf, "fp32", "torch"))


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 4)])
def test_gradcheck(shape):
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(second_moment, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_compile():
    torch.manual_seed(0)

    def twice(total, x):
        second_moment_(total, x)
        return second_moment(x) + total

    x = torch.randn(20, 3)
    eager, traced = M.clone(), M.clone()
    expected = twice(eager, x)
    torch.testing.assert_close(torch.compile(twice, fullgraph=True, backend="aot_eager")(traced, x), expected)
    torch.testing.assert_close(traced, eager)
