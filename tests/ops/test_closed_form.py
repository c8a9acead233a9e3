"""solve_low_rank: the paper's formula, a dense least squares solution in float64, and what it leaves in the layer."""

from __future__ import annotations

import pytest
import torch
from insertion_support import case, cast, full_weight, penalty_for
from torch.utils._python_dispatch import TorchDispatchMode

from pyrewrite.errors import NonFiniteError
from pyrewrite.ops import ConvLayer, InsertionTarget, insertion_loss, layer_values, solve_low_rank
from pyrewrite.ops.closed_form import linear_residual
from pyrewrite.ops.insertion import prepare


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_key_gives_the_papers_formula(dtype):
    torch.manual_seed(0)
    weight, key, goal = torch.randn(7, 12, 1, 1), torch.randn(12), torch.randn(7)
    weight, key, goal = weight.to(dtype), key.to(dtype), goal.to(dtype)
    direction = torch.nn.functional.normalize(torch.randn(12, dtype=dtype), dim=0)
    layer = ConvLayer(weight)
    target = InsertionTarget(key[:, None, None], goal[:, None, None])
    lambda_ = solve_low_rank(layer, direction, target)
    expected = (goal - weight[:, :, 0, 0] @ key) / (direction @ key)
    assert lambda_.dtype == dtype
    assert torch.allclose(lambda_[:, 0, 0, 0], expected, rtol=1e-5 if dtype == torch.float32 else 1e-7)


VARIANTS = [
    {},
    {"demodulate": True, "taps": 4},
    {"kernel": (1, 1), "rank": 3, "i": 9},
    {"o": 1, "sizes": ((1, 1),)},
    {"activate": False, "kernel": (2, 3), "sizes": ((7, 9), (3, 5))},
]


@pytest.mark.parametrize("with_penalty", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_it_is_the_least_squares_solution(variant, with_penalty):
    layer, direction, targets = case(**variant)
    penalty = penalty_for(len(layer.weight), len(direction)) if with_penalty else None
    problem = prepare(layer, direction, targets, penalty)
    residual, demod = linear_residual(problem)
    rows = problem.keys.t() * problem.weight.sqrt()[:, None]  # N x K
    right = residual.t() * problem.weight.sqrt()[:, None]  # N x O
    ridge = 1e-8 * rows.square().sum(0).mean()
    rows = [rows, ridge.sqrt() * torch.eye(len(problem.keys), dtype=torch.float64)]
    if penalty is not None:
        q, matrix = penalty
        mu = (q / (demod.square().mean(0) if demod is not None else 1)).mean()
        values, vectors = torch.linalg.eigh(matrix)
        root = (vectors * values.clamp_min(0).sqrt()).contiguous()
        root = torch.kron(root, torch.eye(layer.weight[0, 0].numel(), dtype=torch.float64)).t()
        rows.append(mu.sqrt() * root)
    rows = torch.cat(rows)
    right = torch.cat([right, right.new_zeros(len(rows) - len(right), right.shape[1])])
    expected = torch.linalg.lstsq(rows, right, driver="gelsd").solution.t()  # O x K
    lambda_ = solve_low_rank(layer, direction, targets, penalty=penalty)
    assert torch.allclose(lambda_.flatten(1), expected, atol=1e-5 * expected.abs().max().item())
    single = cast(layer, direction, targets)
    settings = {"penalty": None if penalty is None else tuple(x.float() for x in penalty)}
    fitted = solve_low_rank(*single, **settings).flatten(1).double() @ problem.keys
    assert torch.allclose(fitted, expected @ problem.keys, atol=1e-3 * residual.abs().max().item())


@pytest.mark.parametrize("taps", [0, 4])
def test_a_reachable_goal_is_reached(taps):
    layer, direction, targets = case(taps=taps, i=12, rank=3, sizes=((8, 8), (6, 10)))
    truth = torch.randn(6, 3, 3, 3, dtype=torch.float64)
    weight = full_weight(layer, direction, truth)
    targets = [InsertionTarget(t.key, layer_values(layer, t, weight), noise=t.noise) for t in targets]
    single = cast(layer, direction, targets)
    lambda_ = solve_low_rank(*single)
    assert torch.allclose(lambda_.double(), truth, atol=1e-3)
    before = insertion_loss(*single, torch.zeros_like(lambda_))
    assert all(a < 1e-3 * b for a, b in zip(insertion_loss(*single, lambda_), before, strict=True))


def test_a_larger_penalty_makes_a_smaller_change():
    layer, direction, targets = cast(*case(demodulate=True))
    norms = []
    for mu in (0.0, 0.1, 10.0, 1e6):
        penalty = (torch.full((6,), mu), torch.eye(2))
        norms.append(solve_low_rank(layer, direction, targets, penalty=penalty).norm().item())
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-3 * norms[0]


def test_keys_of_zero_and_pixels_without_weight():
    layer, direction, targets = cast(*case())
    nothing = [InsertionTarget(torch.zeros_like(t.key), t.goal) for t in targets]
    assert not solve_low_rank(layer, direction, nothing).any()
    target = targets[1]
    goal = target.goal.clone()
    goal[:, target.weight == 0] = 1e6
    moved = InsertionTarget(target.key, goal, noise=target.noise, weight=target.weight)
    assert torch.allclose(solve_low_rank(layer, direction, moved), solve_low_rank(layer, direction, target), rtol=1e-3)


def test_errors():
    layer, direction, targets = cast(*case())
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ridge"):
            solve_low_rank(layer, direction, targets, ridge=ridge)
    with pytest.raises(ValueError, match="positive semidefinite"):
        solve_low_rank(layer, direction, targets, penalty=(torch.ones(6), -1e3 * torch.eye(2)))
    with pytest.raises(NonFiniteError, match=r"targets\[0\].goal"):
        solve_low_rank(layer, direction, InsertionTarget(targets[0].key, targets[0].goal * float("nan")))
    with pytest.raises(ValueError, match="targets is empty"):
        solve_low_rank(layer, direction, [])


class Launches(TorchDispatchMode):
    """Counts what would be a launch on a GPU (views are none), and the times that a single number is waited for."""

    VIEWS = ("view", "expand", "permute", "transpose", "t.", "unsqueeze", "select", "slice", "detach", "alias", "diag")

    def __init__(self):
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = str(function).removeprefix("aten.")
        self.waits += name.startswith(("_local_scalar_dense", "is_nonzero"))
        self.launches += not name.startswith((*self.VIEWS, "_local_scalar_dense", "is_nonzero", "_unsafe_view"))
        return function(*arguments, **(named or {}))


def test_it_launches_little():
    """On a GPU eight targets of the usual size are bound by launches: six of each target, and some fifty in all."""
    counted = []
    for targets in (1, 8):
        arguments = cast(*case(i=40, rank=30, demodulate=True, sizes=((12, 36),) * targets))
        arguments = (*arguments[:2], [InsertionTarget(t.key, t.goal, t.style, t.noise) for t in arguments[2]])
        solve_low_rank(*arguments)
        with Launches() as launches:
            solve_low_rank(*arguments)
        assert launches.waits == 0
        counted.append(launches.launches)
    assert counted[1] - counted[0] <= 6 * 7
    assert counted[1] <= 100
