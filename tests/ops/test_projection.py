"""project_ and project_adam_: every implementation against float64, and against torch in the same type."""

from __future__ import annotations

import pytest
import torch

from pyrewrite.ops import MissingKernelError, _library, project, project_, project_adam_, project_adam_ref, project_ref

IMPLS = ["cpu", "torch", pytest.param("cuda", marks=pytest.mark.cuda)]
SHAPES = [(4, 6, 3, 3), (1, 1, 1, 1), (3, 129, 1, 1), (2, 33, 5, 3), (5, 151, 3, 3), (1, 4, 7, 3, 3), (7, 8, 2, 2)]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed"]


def directions(rank: int, channels: int, dtype=torch.float32) -> torch.Tensor:
    """r x I, orthonormal rows where r <= I."""
    matrix = torch.randn(channels, rank, dtype=torch.float64)
    return (torch.linalg.qr(matrix)[0] if rank <= channels else matrix).T.contiguous().to(dtype)


def laid_out(shape: tuple[int, ...], layout: str, on_device=lambda t: t) -> torch.Tensor:
    """A float32 tensor of this shape whose memory lies as `layout` says, on the device."""
    *outer, o, i, h, w = shape
    if layout == "sliced":
        storage = torch.randn(*outer, 2 * o + 1, i + 3, h + 2, w + 1)
        return on_device(storage)[..., 1 : 2 * o : 2, 2 : i + 2, 1 : h + 1, 1 : w + 1]
    if layout == "transposed":
        return on_device(torch.randn(*outer, w, i, h, o)).transpose(-1, -4)
    if layout == "channels_last":
        return on_device(torch.randn(*outer, o, h, w, i)).movedim(-1, -3)
    return on_device(torch.randn(shape))


def close(result: torch.Tensor, truth: torch.Tensor, baseline: torch.Tensor) -> None:
    """The error against float64 is at most twice that of torch in the same type."""
    result, baseline = result.cpu().double(), baseline.cpu().double()
    scale = truth.abs().max().item() or 1.0
    error = (result - truth).abs().max().item()
    assert error <= 2 * (baseline - truth).abs().max().item() + 2e-6 * scale


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project(shape, layout, impl, on_device):
    torch.manual_seed(0)
    weight, base = laid_out(shape, layout, on_device), laid_out(shape, "contiguous", on_device)
    for rank in {1, min(3, shape[-3]), min(6, shape[-3])}:
        direction = directions(rank, shape[-3])
        before = weight.clone()
        truth = project_ref(before.cpu().double(), base.cpu().double(), direction.double())
        version = weight._version
        assert project_(weight, base, on_device(direction), impl=impl) is weight
        assert weight._version > version
        close(weight, truth, project_ref(before.cpu(), base.cpu(), direction))
        weight.copy_(before)


@pytest.mark.parametrize("impl", IMPLS)
def test_slice_leaves_its_surroundings(impl, on_device):
    torch.manual_seed(0)
    storage = on_device(torch.randn(6, 9, 5, 5))
    before = storage.clone()
    inside = torch.zeros_like(storage, dtype=torch.bool)
    inside[1::2, 2:7, 1:4, 1:4] = True
    weight = storage[1::2, 2:7, 1:4, 1:4]
    project_(weight, on_device(torch.randn(weight.shape)), on_device(directions(2, 5)), impl=impl)
    assert torch.equal(storage[~inside], before[~inside])
    assert not torch.equal(storage[inside], before[inside])


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_projection_does(impl, on_device):
    torch.manual_seed(0)
    base, direction = on_device(torch.randn(5, 12, 3, 3)), on_device(directions(3, 12))
    other = on_device(directions(12, 12)[3:])
    # A change along the directions stays, one across them goes, and none remains none.
    along = torch.einsum("orhw,ri->oihw", torch.randn(5, 3, 3, 3).to(base.device), direction)
    weight = on_device((base + along).clone())
    kept = weight.clone()
    project_(weight, base, direction, impl=impl)
    torch.testing.assert_close(weight, kept, atol=2e-6, rtol=0)
    weight.copy_(base)
    project_(weight, base, other, impl=impl)
    assert torch.equal(weight, base)
    project_(weight, base, on_device(directions(12, 12)[:0]), impl=impl)  # rank 0: no change is allowed
    assert torch.equal(weight, base)


@pytest.mark.parametrize("impl", IMPLS)
def test_list_in_one_call(impl, on_device):
    torch.manual_seed(0)
    shapes = [(n % 5 + 1, 3 * n + 1, 1 + 2 * (n % 2), 3) for n in range(33)] + [(0, 4, 3, 3), (2, 0, 3, 3)]
    shapes += [(2, 4 * n + 4, 1 + 2 * (n % 2), 1 + 2 * (n % 2)) for n in range(17)]
    weights = [on_device(torch.randn(s)) for s in shapes]
    bases = [on_device(torch.randn(s)) for s in shapes]
    ds = [on_device(directions(min(2, s[1]), s[1])) for s in shapes]
    truth = [project_ref(w.cpu().double(), b.cpu().double(), d.cpu().double()) for w, b, d in
             zip(weights, bases, ds, strict=True)]  # fmt: skip
    assert project_(weights, bases, ds, impl=impl) is weights
    for w, t in zip(weights, truth, strict=True):
        torch.testing.assert_close(w.cpu().double(), t, atol=1e-5, rtol=0)
    assert project_([], [], [], impl=impl) == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("shape", "rank"), [((3, 1100, 3, 3), 4), ((2, 700, 3, 3), 700), ((1, 2100, 1, 1), 1)])
def test_wide_layers(shape, rank, impl, on_device):
    torch.manual_seed(0)
    weight, base, direction = on_device(torch.randn(shape)), on_device(torch.randn(shape)), directions(rank, shape[1])
    truth = project_ref(weight.cpu().double(), base.cpu().double(), direction.double())
    baseline = project_ref(weight.cpu(), base.cpu(), direction)
    project_(weight, base, on_device(direction), impl=impl)
    close(weight, truth, baseline)


# The sizes that a CUDA kernel of their own takes, around its borders: channels of one, several and a broken number of
# warps, ranks around its groups of directions, one more than it takes.
VECTORS = [
    (3, 8, 3, 3),
    (2, 100, 3, 3),
    (3, 128, 1, 1),
    (1, 2, 132, 3, 3),
    (2, 512, 3, 3),
    (1, 1024, 3, 3),
    (1, 1028, 3, 3),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", VECTORS, ids=str)
def test_vectors(shape, impl, on_device):
    torch.manual_seed(0)
    base, start = on_device(torch.randn(shape)), torch.randn(shape)
    weight = on_device(start.clone())
    for rank in (0, 1, 2, 3, 4, 7, 30, 64, 128, 129):
        direction = directions(rank, shape[-3]) if rank <= shape[-3] else torch.randn(rank, shape[-3]) / shape[-3]
        weight.copy_(start)
        project_(weight, base, on_device(direction), impl=impl)
        truth = project_ref(start.double(), base.cpu().double(), direction.double())
        close(weight, truth, project_ref(start, base.cpu(), direction))


@pytest.mark.parametrize("impl", IMPLS)
def test_vectors_with_neighbours(impl, on_device):
    """Rows without gaps inside a larger tensor, and rows at an address that no vector may have."""
    torch.manual_seed(0)
    for first, channels in ((4, 8), (1, 8), (0, 9)):
        storage = on_device(torch.randn(5, 20, 3, 3))
        before = storage.clone()
        weight = storage[1:4, first : first + channels]
        base, direction = on_device(torch.randn(weight.shape)), directions(2, channels)
        project_(weight, base, on_device(direction), impl=impl)
        truth = project_ref(before[1:4, first : first + channels].cpu(), base.cpu(), direction)
        torch.testing.assert_close(weight.cpu(), truth, atol=2e-6, rtol=0)
        storage[1:4, first : first + channels] = before[1:4, first : first + channels]
        assert torch.equal(storage, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_direction(impl, on_device):
    torch.manual_seed(0)
    weight, base = on_device(torch.randn(3, 10, 3, 3)), on_device(torch.randn(3, 10, 3, 3))
    wide = on_device(torch.randn(20, 6))
    direction = wide[::2, 1:5].T  # 4 x 10
    truth = project_ref(weight.cpu().double(), base.cpu().double(), direction.cpu().double())
    project_(weight, base, direction, impl=impl)
    torch.testing.assert_close(weight.cpu().double(), truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_seen(bad, impl, on_device):
    torch.manual_seed(0)
    weight, base = on_device(torch.randn(3, 10, 3, 3)), on_device(torch.randn(3, 10, 3, 3))
    weight[1, 4, 0, 2] = bad
    project_(weight, base, on_device(directions(2, 10)), impl=impl)
    assert not weight[1, :, 0, 2].isfinite().any()
    assert weight[[0, 2]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(4, 6, 3, 3), (1, 3, 33, 3, 3), (2, 129, 1, 1), (1, 1, 1, 1), (2, 136, 3, 3), (3, 12, 1, 1)], ids=str
)
@pytest.mark.parametrize("projecting", [True, False])
def test_adam(projecting, shape, layout, impl, on_device):
    torch.manual_seed(0)
    weight, base, grad = (laid_out(shape, layout, on_device) for _ in range(3))
    exp_avg, exp_avg_sq = laid_out(shape, layout, on_device), laid_out(shape, layout, on_device).abs_()
    direction = directions(min(2, shape[-3]), shape[-3])
    settings = {"step": 3, "lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "project": projecting}
    now = [t.cpu().clone() for t in (weight, base, direction, grad, exp_avg, exp_avg_sq)]
    truth = project_adam_ref(*(t.double() for t in now), **settings)
    baseline = project_adam_ref(*now, **settings)
    project_adam_(weight, base, on_device(direction), grad, exp_avg, exp_avg_sq, impl=impl, **settings)
    for got, wanted, usual in zip((weight, exp_avg, exp_avg_sq), truth, baseline, strict=True):
        close(got, wanted, usual)
    assert torch.equal(base.cpu(), now[1])
    assert torch.equal(grad.cpu(), now[3])


@pytest.mark.parametrize("impl", IMPLS)
def test_adam_is_that_of_torch(impl, on_device):
    """Twenty steps without projection follow torch.optim.Adam."""
    torch.manual_seed(0)
    ours = on_device(torch.randn(3, 5, 3, 3))
    theirs = ours.clone().requires_grad_()
    optimiser = torch.optim.Adam([theirs], lr=0.05)
    exp_avg, exp_avg_sq = on_device(torch.zeros(3, 5, 3, 3)), on_device(torch.zeros(3, 5, 3, 3))
    direction = on_device(directions(1, 5))
    for step in range(1, 21):
        theirs.grad = torch.sin(3 * theirs.detach())
        grad = on_device(theirs.grad.clone())
        optimiser.step()
        project_adam_(ours, ours, direction, grad, exp_avg, exp_avg_sq, step=step, lr=0.05, project=False, impl=impl)
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=0)


def test_other_types_in_torch():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)):
        torch.manual_seed(0)
        weight, base = torch.randn(3, 7, 3, 3, dtype=dtype), torch.randn(3, 7, 3, 3, dtype=dtype)
        direction = directions(2, 7, dtype)
        truth = project_ref(weight.double(), base.double(), direction.double())
        project_(weight, base, direction)  # None: the kernels take float32, so torch
        torch.testing.assert_close(weight.double(), truth, atol=tolerance, rtol=0)
        with pytest.raises(TypeError, match=rf"project_: impl='cpu' takes float32, got {str(dtype)[6:]}"):
            project_(weight, base, direction, impl="cpu")


def test_threads_do_not_change_the_result():
    torch.manual_seed(0)
    weight, base, direction = torch.randn(7, 20, 3, 3), torch.randn(7, 20, 3, 3), directions(3, 20)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 16):
            torch.set_num_threads(count)
            results.append(project(weight, base, direction, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


W, D = torch.zeros(2, 3, 3, 3), torch.zeros(1, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W[0], W[0], D), ValueError, r"weight must be O x I x kh x kw or 1 x O x I x kh x kw, got shape \(3, 3, 3\)"),
        ((W[None].expand(2, 2, 3, 3, 3), W, D), ValueError, r"weight must be O x I x kh x kw or 1 x O"),
        ((W, W[:1], D), ValueError, r"base must have the weight's shape \(2, 3, 3, 3\), got \(1, 3, 3, 3\)"),
        ((W, W, D[:, :2]), ValueError, r"direction must be r x 3 for a weight of shape \(2, 3, 3, 3\), got \(1, 2\)"),
        ((W, W, D[0]), ValueError, r"direction must be r x 3"),
        ((W, W.double(), D), TypeError, r"base must be float32 as the first weight, got float64"),
        ((W, W, D.half()), TypeError, r"direction must be float32 as the first weight, got float16"),
        ((W.int(), W.int(), D.int()), TypeError, r"weight must be floating point, got int32"),
        ((W[:1].expand(4, 3, 3, 3), W.new_zeros(4, 3, 3, 3), D), ValueError, r"weight is an expanded tensor"),
        (([W, W], [W], D), ValueError, r"base must hold one tensor for each weight: 2, got 1"),
        ((W.to("meta"), W, D), ValueError, r"base must be on meta as the first weight, got cpu"),
    ],
)
@pytest.mark.parametrize("impl", [None, "cpu", "torch", "cuda"])
def test_refusals(arguments, error, message, impl):
    with pytest.raises(error, match=message):
        project_(*arguments, impl=impl)
    weight, base, direction = arguments
    with pytest.raises(error, match=message):
        project_adam_(weight, base, direction, weight, weight, weight, step=1, lr=0.1, impl=impl)


def test_more_refusals():
    with pytest.raises(ValueError, match="impl must be None or one of 'cuda', 'cpu', 'torch', got 'gpu'"):
        project_(W, W, D, impl="gpu")
    for settings, message in (
        ({"step": 0}, "step must be 1 or more"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\), got \(1.0, 0.9\)"),
        ({"lr": float("nan")}, "lr and eps must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            project_adam_(W, W, D, W, W, W, **({"step": 1, "lr": 0.1} | settings))
    leaf = W.clone().requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"project_ writes in place and has no gradient: call it under torch.no_grad"
    ):
        project_(leaf, W, D)
    with torch.no_grad():
        project_(leaf, W, D)


@pytest.mark.skipif(not _library.cuda_report()["problem"], reason="a CUDA kernel can run here")
def test_cuda_that_is_not_there_raises():
    with pytest.raises(MissingKernelError, match="project_: impl='cuda' cannot run: "):
        project_(W.clone(), W, D, impl="cuda")


def test_missing_binary_says_so(monkeypatch):
    monkeypatch.setattr(_library, "_load", lambda: (None, "the binary module pyrewrite._C is missing"))
    for impl in (None, "cpu"):
        with pytest.raises(MissingKernelError, match=r"project_: the binary module pyrewrite._C is missing"):
            project_(W.clone(), W, D, impl=impl)
    project_(W.clone(), W, D, impl="torch")


def test_opcheck():
    torch.manual_seed(0)
    w, b, d = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), directions(2, 4)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    torch.library.opcheck(torch.ops.pyrewrite.project_, ([w, w.clone()], [b, b], [d, d], None))
    adam = ([w], [b], [d], [b], [m], [v], 1, 0.1, 0.9, 0.999, 1e-8, True, None)
    torch.library.opcheck(torch.ops.pyrewrite.project_adam_, adam)
    torch.library.opcheck(torch.ops.pyrewrite.project, (w, b, d, None))
    leaves = [t.double().requires_grad_() for t in (w, b, d)]
    torch.library.opcheck(torch.ops.pyrewrite.project, (*leaves, "torch"))


@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (1, 2, 4, 1, 1)])
def test_gradcheck(shape):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, shape, (2, 4))]
    assert torch.autograd.gradcheck(project, leaves)


def test_compile():
    torch.manual_seed(0)
    w, b, d = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), directions(2, 4)
    m, v = torch.zeros_like(w), torch.zeros_like(w)

    def steps(weight, base, direction, grad, exp_avg, exp_avg_sq):
        project_adam_(weight, base, direction, grad, exp_avg, exp_avg_sq, step=1, lr=0.1)
        project_(weight, base, direction)
        return project(weight, base, direction) + 1

    eager = [t.clone() for t in (w, b, d, b, m, v)]
    traced = [t.clone() for t in eager]
    expected = steps(*eager)
    result = torch.compile(steps, fullgraph=True, backend="aot_eager")(*traced)
    torch.testing.assert_close(result, expected)
    for left, right in zip(traced, eager, strict=True):
        torch.testing.assert_close(left, right)
