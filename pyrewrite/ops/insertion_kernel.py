"""The torch operator over the insertion kernels: steps of Adam on Lambda, in place, all of them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrewrite.ops import _library

if TYPE_CHECKING:
    from pyrewrite.ops.insertion import InsertionProblem

MUTATED = ("lambda_", "exp_avg", "exp_avg_sq", "losses")


@_library.torch_operator("pyrewrite::insertion_steps_", mutates=MUTATED)
def insertion_steps_(
    lambda_: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    losses: Tensor,
    base: Tensor,
    keys: Tensor,
    goal: Tensor,
    noise: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Sequence[int],
    energy: Tensor | None,
    cross: Tensor | None,
    gram: Tensor | None,
    penalty_scale: Tensor | None,
    penalty_matrix: Tensor | None,
    rank: int,
    negative_slope: float,
    gain: float,
    first: int,
    count: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    kernel: Sequence[int],
    shapes: Sequence[int],
    flipped: bool,
    impl: str | None = None,
) -> None:
    """Steps first ... first + count - 1 of the loop. The tensors are those of `InsertionProblem`, float32, on one
    device. shapes: height and width of each target, one after the other. impl: "cpu", "cuda" or None, the kernel for
    the tensors' device.

    lambda_, exp_avg, exp_avg_sq: O x K, contiguous, changed in place. losses: float64; entries first ... first + count
    - 1 are written.
    """
    o, k = lambda_.shape
    n = base.shape[1]
    b = len(starts) - 1
    if rank < 1 or k % rank:
        raise ValueError(f"rank: expected a divisor of the {k} rows of keys, got {rank}")
    if first < 0 or count < 0:
        raise ValueError(f"first and count: expected numbers >= 0, got {first} and {count}")
    for name, x, shape in (
        ("exp_avg", exp_avg, (o, k)),
        ("exp_avg_sq", exp_avg_sq, (o, k)),
        ("base", base, (o, n)),
        ("keys", keys, (k, n)),
        ("goal", goal, (o, n)),
        ("noise", noise, (n,)),
        ("weight", weight, (n,)),
        ("bias", bias, (o,)),
        ("energy", energy, (b, o)),
        ("cross", cross, (b, o, k)),
        ("gram", gram, (b, rank, rank)),
        ("penalty_scale", penalty_scale, (o,)),
        ("penalty_matrix", penalty_matrix, (rank, rank)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
        if x is not None and x.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, got {x.dtype}")
        if x is not None and x.device != lambda_.device:
            raise ValueError(f"{name}: expected a tensor on {lambda_.device}, as lambda_, got one on {x.device}")
    if (energy is None) != (cross is None) or (energy is None) != (gram is None):
        raise ValueError("energy, cross and gram: expected all three or none")
    if (penalty_scale is None) != (penalty_matrix is None):
        raise ValueError("penalty_scale and penalty_matrix: expected both or none")
    if lambda_.dtype != torch.float32 or losses.dtype != torch.float64:
        raise TypeError(f"lambda_ and losses: expected float32 and float64, got {lambda_.dtype} and {losses.dtype}")
    if losses.device != lambda_.device:
        raise ValueError(f"losses: expected a tensor on {lambda_.device}, as lambda_, got one on {losses.device}")
    if losses.ndim != 1 or len(losses) < first + count or starts[0] != 0 or starts[-1] != n:
        raise ValueError(
            f"expected losses of {first + count} entries and starts from 0 to {n}, got {losses.shape} and {starts}"
        )
    if not all(x.is_contiguous() for x in (lambda_, exp_avg, exp_avg_sq, losses)):
        raise ValueError("lambda_, exp_avg, exp_avg_sq and losses: expected contiguous tensors")
    shapes = list(shapes)
    sizes = [h * w for h, w in zip(shapes[::2], shapes[1::2], strict=False)]
    if len(shapes) != 2 * b or any(y - x != size for x, y, size in zip(starts, starts[1:], sizes, strict=False)):
        raise ValueError(f"shapes: expected height and width of the targets with starts {starts}, got {shapes}")
    if len(kernel) != 2 or kernel[0] * kernel[1] * rank != k:
        raise ValueError(f"kernel: expected height and width of {k // rank} taps, got {kernel}")
    chosen = _library.resolve("insert_low_rank", impl, lambda_)
    if chosen == "torch":
        raise ValueError(f"insertion_steps_ has kernels for the processor and for CUDA, got tensors on {base.device}")
    kept = [
        None if x is None else x.contiguous()
        for x in (base, keys, goal, noise, weight, bias, energy, cross, gram, penalty_scale, penalty_matrix)
    ]
    module = _library.native("insert_low_rank")
    arguments = {
        "sizes": (o, rank, k // rank, first, count),
        "starts": list(starts),
        "shape": (*kernel, flipped),
        "shapes": shapes,
        "problem": [0 if x is None else x.data_ptr() for x in kept],
        "state": [lambda_.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), losses.data_ptr() + 8 * first],
        "settings": (negative_slope, gain, lr, beta1, beta2, eps),
    }
    if chosen == "cpu":
        module.insertion_steps_cpu(**arguments, threads=torch.get_num_threads())
    else:
        device, stream, wait = _library.launch_place(lambda_)
        module.insertion_steps_cuda(**arguments, device=device, stream=stream, wait=wait)


@insertion_steps_.register_fake
def _(*arguments: object) -> None:
    return None


def run_steps(
    impl: str,
    problem: InsertionProblem,
    lambda_: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    losses: Tensor,
    first: int,
    count: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """`run_steps_ref` by a kernel. impl: "cpu" or "cuda"."""
    q, matrix = (None, None) if problem.penalty is None else problem.penalty
    insertion_steps_(
        lambda_,
        exp_avg,
        exp_avg_sq,
        losses,
        problem.base,
        problem.keys,
        problem.goal,
        problem.noise,
        problem.weight,
        problem.bias,
        problem.starts,
        problem.energy,
        problem.cross,
        problem.gram,
        q,
        matrix,
        problem.rank,
        problem.negative_slope,
        problem.gain,
        first,
        count,
        lr,
        *betas,
        eps,
        problem.kernel,
        [size for shape in problem.shapes for size in shape],
        problem.flipped,
        impl,
    )
