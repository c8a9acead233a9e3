"""The torch operator over the insertion kernels: steps of Adam on Lambda, in place, all of them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrewrite.ops import _library

if TYPE_CHECKING:
    from pyrewrite.ops.insertion import InsertionProblem

CONSTANT = (
    "base", "keys", "goal", "noise", "weight", "bias", "energy", "cross", "gram", "penalty_scale", "penalty_matrix",
)  # fmt: skip
MUTATED = ("lambda_", "exp_avg", "exp_avg_sq", "losses")


@dataclass(frozen=True)
class Edit:
    """What a kernel needs of one edit; names as in `InsertionProblem`."""

    lambda_: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    losses: Tensor
    base: Tensor
    keys: Tensor
    goal: Tensor
    noise: Tensor
    weight: Tensor
    bias: Tensor
    energy: Tensor | None
    cross: Tensor | None
    gram: Tensor | None
    penalty_scale: Tensor | None
    penalty_matrix: Tensor | None
    starts: list[int]
    shapes: list[int]
    rank: int
    negative_slope: float
    gain: float
    kernel: tuple[int, ...]
    flipped: bool

    @property
    def constant(self) -> list[Tensor | None]:
        return [getattr(self, name) for name in CONSTANT]

    def check(self, first: int, count: int) -> None:
        """Raises TypeError or ValueError, naming the argument."""
        lambda_, losses, starts, shapes, kernel = self.lambda_, self.losses, self.starts, self.shapes, self.kernel
        if lambda_.ndim != 2 or self.base.ndim != 2:
            raise ValueError(f"lambda_ and base: expected O x K and O x N, got {lambda_.shape} and {self.base.shape}")
        o, k = lambda_.shape
        n, b, rank = self.base.shape[1], len(starts) - 1, self.rank
        if rank < 1 or k % rank:
            raise ValueError(f"rank: expected a divisor of the {k} rows of keys, got {rank}")
        if first < 0 or count < 0:
            raise ValueError(f"first and count: expected numbers >= 0, got {first} and {count}")
        shapes_of = {"exp_avg": (o, k), "exp_avg_sq": (o, k), "base": (o, n), "keys": (k, n), "goal": (o, n)}
        shapes_of |= {"noise": (n,), "weight": (n,), "bias": (o,)}
        shapes_of |= {"energy": (b, o), "cross": (b, o, k), "gram": (b, rank, rank)}
        shapes_of |= {"penalty_scale": (o,), "penalty_matrix": (rank, rank)}
        for name, shape in shapes_of.items():
            x = getattr(self, name)
            if x is None:
                continue
            if x.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
            if x.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32, got {x.dtype}")
            if x.device != lambda_.device:
                raise ValueError(f"{name}: expected a tensor on {lambda_.device}, as lambda_, got one on {x.device}")
        if len({x is None for x in (self.energy, self.cross, self.gram)}) > 1:
            raise ValueError("energy, cross and gram: expected all three or none")
        if (self.penalty_scale is None) != (self.penalty_matrix is None):
            raise ValueError("penalty_scale and penalty_matrix: expected both or none")
        if lambda_.dtype != torch.float32 or losses.dtype != torch.float64:
            raise TypeError(f"lambda_ and losses: expected float32 and float64, got {lambda_.dtype} and {losses.dtype}")
        if losses.device != lambda_.device:
            raise ValueError(f"losses: expected a tensor on {lambda_.device}, as lambda_, got one on {losses.device}")
        if losses.ndim != 1 or len(losses) < first + count or starts[0] != 0 or starts[-1] != n:
            raise ValueError(
                f"expected losses of {first + count} entries and starts from 0 to {n}, got {losses.shape} and {starts}"
            )
        if not all(x.is_contiguous() for x in self.state):
            raise ValueError("lambda_, exp_avg, exp_avg_sq and losses: expected contiguous tensors")
        sizes = [h * w for h, w in zip(shapes[::2], shapes[1::2], strict=False)]
        if len(shapes) != 2 * b or any(y - x != size for x, y, size in zip(starts, starts[1:], sizes, strict=False)):
            raise ValueError(f"shapes: expected height and width of the targets with starts {starts}, got {shapes}")
        if len(kernel) != 2 or kernel[0] * kernel[1] * rank != k:
            raise ValueError(f"kernel: expected height and width of {k // rank} taps, got {kernel}")

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self.lambda_, self.exp_avg, self.exp_avg_sq, self.losses


def run_edits(
    edits: list[Edit], first: int, count: int, adam: tuple[float, float, float, float], impl: str | None
) -> None:
    """Steps first ... first + count - 1 of independent edits, in one call of a kernel. adam: lr, beta1, beta2, eps."""
    for edit in edits:
        edit.check(first, count)
        if edit.lambda_.device != edits[0].lambda_.device:
            devices = edits[0].lambda_.device, edit.lambda_.device
            raise ValueError(f"expected all edits on one device, got {devices[0]} and {devices[1]}")
    addresses = [x.data_ptr() for edit in edits for x in edit.state if x.numel()]
    if len(set(addresses)) < len(addresses):
        raise ValueError("two of the tensors that are changed in place share their memory")
    chosen = _library.resolve("insert_low_rank", impl, edits[0].lambda_)
    if chosen == "torch":
        device = edits[0].lambda_.device
        raise ValueError(f"insertion_steps_ has kernels for the processor and for CUDA, got tensors on {device}")
    module = _library.native("insert_low_rank")
    kept, native = [], []
    for edit in edits:
        constant = [None if x is None else x.contiguous() for x in edit.constant]
        kept.append(constant)
        *state, losses = edit.state
        native.append(
            module.InsertionEdit(
                sizes=(len(edit.lambda_), edit.rank, edit.lambda_.shape[1] // edit.rank, first, count),
                starts=edit.starts,
                shape=(*edit.kernel, edit.flipped),
                shapes=edit.shapes,
                problem=[0 if x is None else x.data_ptr() for x in constant],
                state=[*(x.data_ptr() for x in state), losses.data_ptr() + 8 * first],
                settings=(edit.negative_slope, edit.gain, *adam),
            )
        )
    if chosen == "cpu":
        module.insertion_steps_cpu(native, torch.get_num_threads())
    else:
        device, stream, wait = _library.launch_place(edits[0].lambda_)
        workspace = _library.workspace(module.insertion_workspace(native, device), edits[0].lambda_)
        module.insertion_steps_cuda(native, workspace.data_ptr(), device, stream, wait)


@_library.torch_operator("pyrewrite::insertion_steps_", mutates=MUTATED)
def insertion_steps_(
    lambda_: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    losses: Sequence[Tensor],
    base: Sequence[Tensor],
    keys: Sequence[Tensor],
    goal: Sequence[Tensor],
    noise: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    energy: Sequence[Tensor],
    cross: Sequence[Tensor],
    gram: Sequence[Tensor],
    penalty_scale: Sequence[Tensor],
    penalty_matrix: Sequence[Tensor],
    targets: Sequence[int],
    shapes: Sequence[int],
    rank: Sequence[int],
    negative_slope: Sequence[float],
    gain: Sequence[float],
    kernel: Sequence[int],
    flipped: Sequence[bool],
    first: int,
    count: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    impl: str | None = None,
) -> None:
    """Steps first ... first + count - 1 of the loop, of several independent edits in one call. On a GPU, edits of one
    shape share a launch. An edit's result does not depend on those beside it.

    Every list holds one entry for each edit (kernel: two, shapes: height and width of each of its `targets`). The
    tensors are those of `InsertionProblem`, float32, all on one device; an empty tensor in energy, cross, gram,
    penalty_scale and penalty_matrix stands for None. impl: "cpu", "cuda" or None, the kernel for the tensors' device.

    lambda_, exp_avg, exp_avg_sq: O x K, contiguous, changed in place. losses: float64; entries first ... first + count
    - 1 are written.
    """
    tensors = (
        lambda_, exp_avg, exp_avg_sq, losses, base, keys, goal, noise, weight, bias, energy, cross, gram, penalty_scale,
        penalty_matrix,
    )  # fmt: skip
    numbers = (targets, rank, negative_slope, gain, flipped)
    if not all(len(x) == len(lambda_) for x in (*tensors, *numbers)) or len(kernel) != 2 * len(lambda_):
        raise ValueError(f"expected lists for {len(lambda_)} edits, as lambda_, got others")
    if len(shapes) != 2 * sum(targets) or min(targets, default=1) < 1:
        raise ValueError(f"shapes: expected height and width of {list(targets)} targets, got {list(shapes)}")
    edits, done = [], 0
    for n, held in enumerate(zip(*tensors, strict=True)):
        own = list(shapes[2 * done : 2 * (done + targets[n])])
        done += targets[n]
        starts = list(accumulate((h * w for h, w in zip(own[::2], own[1::2], strict=True)), initial=0))
        held = [x if i < 10 or x.numel() else None for i, x in enumerate(held)]
        edits.append(
            Edit(*held, starts, own, rank[n], negative_slope[n], gain[n], tuple(kernel[2 * n : 2 * n + 2]), flipped[n])
        )
    if edits:
        run_edits(edits, first, count, (lr, beta1, beta2, eps), impl)


@insertion_steps_.register_fake
def _(*arguments: object) -> None:
    return None


def run_steps(
    impl: str,
    problems: Sequence[InsertionProblem],
    lambda_: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    losses: Sequence[Tensor],
    first: int,
    count: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """`run_steps_ref` by a kernel, all problems in one call. impl: "cpu" or "cuda"."""

    def each(name: str) -> list[Tensor]:
        values = [getattr(problem, name) for problem in problems]
        return [problem.base.new_empty(0) if x is None else x for x, problem in zip(values, problems, strict=True)]

    penalties = [problem.penalty or (problem.base.new_empty(0),) * 2 for problem in problems]
    insertion_steps_(
        lambda_,
        exp_avg,
        exp_avg_sq,
        losses,
        *(each(name) for name in CONSTANT[:9]),
        [q for q, _ in penalties],
        [matrix for _, matrix in penalties],
        [len(problem.shapes) for problem in problems],
        [size for problem in problems for shape in problem.shapes for size in shape],
        [problem.rank for problem in problems],
        [problem.negative_slope for problem in problems],
        [problem.gain for problem in problems],
        [size for problem in problems for size in problem.kernel],
        [problem.flipped for problem in problems],
        first,
        count,
        lr,
        *betas,
        eps,
        impl,
    )
