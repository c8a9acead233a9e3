"""The insertion in closed form: least squares before the layer's nonlinearity.

Before the leaky ReLU, and with the demodulation held at W0, the layer is linear in Lambda, so the goal can be carried
back through gain, leaky ReLU, noise, bias and demodulation and fitted by least squares. For one key without spatial
extent this is Lambda = (v* - W0 k*) / (d . k*), equation 12 of Bau et al. (ECCV 2020). Milliseconds where the loop
takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrewrite.ops.insertion import InsertionProblem, Penalty, prepare
from pyrewrite.ops.insertion_geometry import ConvLayer, InsertionTarget


@torch.no_grad()
def solve_low_rank(
    layer: ConvLayer,
    direction: Tensor,
    targets: InsertionTarget | Sequence[InsertionTarget],
    *,
    penalty: Penalty | None = None,
    ridge: float = 1e-8,
) -> Tensor:
    """Lambda (O x r x kh x kw) of the least squares fit of all targets; arguments and errors as in `insert_low_rank`.

    Minimises for every output channel  sum_u w_u (scale conv(D key, Lambda)_u - (g(goal) - base)_u)^2 + mu <Lambda, P
    Lambda>, where g undoes what follows the convolution and w are the weights of the pixels, which sum to 1 over all
    targets. The channels share one Gram matrix, (r kh kw)^2. With penalty = (q, P), mu is the mean over the channels of
    q_o / demod_o^2: the loop's penalty measures the values after demodulation, this one before it.
    ridge: added to the Gram matrix, as a part of its mean diagonal; what makes the solution unique where the keys do
    not.
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge: expected a finite number >= 0, got {ridge!r}")
    problem = prepare(layer, direction, targets, penalty, loop=False)
    residual, demod = linear_residual(problem)
    keys = problem.keys.double()  # K x N
    weighted = keys * problem.weight.double()
    gram = weighted @ keys.t()  # K x K
    scale = gram.diagonal().mean()
    if problem.penalty is not None:
        q, matrix = problem.penalty
        mu = (q if demod is None else q / demod.square().mean(0)).double().mean()
        taps = torch.eye(problem.kernel[0] * problem.kernel[1], dtype=gram.dtype, device=gram.device)
        gram = gram + mu * torch.kron(matrix.double().contiguous(), taps)
    shape = (len(residual), problem.rank, *problem.kernel)
    right = weighted @ residual.double().t()  # K x O
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Where ridge is 0 or the penalty is not positive, rounding may leave a negative eigenvalue: then a larger ridge, up
    # to 1e-4.
    for part in (ridge, max(ridge, 1e-12), max(ridge, 1e-8), max(ridge, 1e-4)):
        factor, failed = torch.linalg.cholesky_ex(gram + (part * scale) * identity)
        nothing, failed = torch.stack([scale == 0, failed != 0]).tolist()  # a GPU is waited for once
        if nothing:  # keys of zero act on nothing
            return residual.new_zeros(shape)
        if not failed:
            return torch.cholesky_solve(right, factor).t().to(residual.dtype).reshape(shape)
    raise ValueError("penalty[1] (P) has eigenvalues far below 0: expected a positive semidefinite matrix")


def linear_residual(problem: InsertionProblem) -> tuple[Tensor, Tensor | None]:
    """What conv(D key, Lambda) should be, g(goal) - base, O x N, and the demodulation at W0, B x O or None."""
    x = problem.goal / problem.gain
    x = torch.where(x > 0, x, x / problem.negative_slope) - (problem.noise + problem.bias[:, None])
    if problem.energy is None:
        return x - problem.base, None
    demod = problem.energy.rsqrt()  # B x O
    counts = torch.tensor([b - a for a, b in problem.ranges], device=x.device)
    return x / demod.t().repeat_interleave(counts, 1, output_size=x.shape[1]) - problem.base, demod
