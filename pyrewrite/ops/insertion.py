"""Low-rank insertion: find Lambda so that a layer with the weight W0 + Lambda D puts out what is wanted.

Bau et al., "Rewriting a Deep Generative Model" (ECCV 2020), sections 3.2 and 3.3: D (r x I) spans the directions of the
context, and Adam minimises the L1 distance to the goal over Lambda (O x r x kh x kw). Here any number of targets share
one Lambda.

Since conv(key, W0 + Lambda D) = conv(key, W0) + conv(D key, Lambda), a step only needs the r channels of D key.
`prepare` computes once all that is constant; the loop then sees matrices only (`InsertionProblem`), and so does its
kernel.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from pyrewrite._finite import all_finite
from pyrewrite.errors import NonFiniteError
from pyrewrite.ops import _library
from pyrewrite.ops.insertion_geometry import (
    DEMODULATION_EPSILON,
    ConvLayer,
    InsertionTarget,
    Later,
    blur_padding,
    check_direction,
    check_layer,
    check_numbers,
    check_targets,
    check_tensor,
    conv_crop,
    crop_key,
    demodulation,
    key_size,
    layer_values,
    margins,
    unfold_keys,
    upsample_margins,
)
from pyrewrite.ops.insertion_kernel import run_steps

__all__ = [
    "ConvLayer",
    "Edit",
    "Insertion",
    "InsertionProblem",
    "InsertionTarget",
    "blur_padding",
    "crop_key",
    "demodulation",
    "insert_low_rank",
    "insert_low_rank_batch",
    "insert_low_rank_ref",
    "insertion_loss",
    "key_size",
    "layer_values",
    "margins",
    "prepare",
    "upsample_margins",
]

Penalty = tuple[Tensor, Tensor]  # q: O, P: r x r
Callback = Callable[[int, float], object]
BatchCallback = Callable[[int, list[float]], object]

CALLBACK_SECONDS = 0.08  # about how often a callback is called and Ctrl-C is seen


@dataclass(frozen=True)
class Insertion:
    """The result of `insert_low_rank`.

    lambda_  O x r x kh x kw
    losses   steps, float64, each recorded before its step
    penalty  the penalty term at the end
    """

    lambda_: Tensor
    losses: Tensor
    penalty: float = 0.0


@dataclass(frozen=True)
class InsertionProblem:
    """All that is constant in the loop. The pixels of all B targets stand side by side: N columns. K = r kh kw.

    base     O x N    scale * conv(key, W0), blurred where the layer is
    keys     K x N    scale * the unfolded D key: conv(D key, Lambda) = Lambda.flatten(1) @ keys
    goal     O x N
    noise    N
    weight   N        weights of the pixels in the loss: w / sum of the target's w / B, so that they sum to 1
    bias     O
    starts   B + 1    the first column of each target, and N
    energy   B x O, cross B x O x K, gram B x r x r: the squared norm of target b's modulated filter o is
             energy + 2 <Lambda_o, cross> + <Lambda_o, gram Lambda_o>, the factor scale^2 and 1e-8 included; None: no
             demodulation
    penalty  q (O) and P (r x r): adds mean_o q_o <Lambda_o, P Lambda_o>; or None
    shapes   B pairs: height and width of each target
    flipped  how the rows of keys follow from one map a direction: row (d, ty, tx) at pixel (y, x) is map_d[y + ty][x +
             tx], or, flipped, map_d[y + kh - 1 - ty][x + kw - 1 - tx]
    """

    base: Tensor
    keys: Tensor
    goal: Tensor
    noise: Tensor
    weight: Tensor
    bias: Tensor
    starts: list[int]
    energy: Tensor | None
    cross: Tensor | None
    gram: Tensor | None
    penalty: Penalty | None
    kernel: tuple[int, int]
    negative_slope: float
    gain: float
    shapes: list[tuple[int, int]]
    flipped: bool

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The first column of each target and the one after its last."""
        return list(zip(self.starts, self.starts[1:], strict=False))

    @property
    def rank(self) -> int:
        return self.keys.shape[0] // (self.kernel[0] * self.kernel[1])


# -- what is constant in the loop --------------------------------------------------------------------------------------


@torch.no_grad()
def prepare(
    layer: ConvLayer,
    direction: Tensor,
    targets: InsertionTarget | Sequence[InsertionTarget],
    penalty: Penalty | None = None,
    *,
    loop: bool = True,
) -> InsertionProblem:
    """Compute what is constant in the loop. Arguments and errors as in `insert_low_rank`.

    loop=False leaves out cross and gram, which only the loop needs.
    """
    numbers: Later = []  # looked at together: a GPU is waited for once
    layer = check_layer(layer, numbers)
    direction = check_direction(layer, direction, numbers)
    targets = check_targets(layer, targets, numbers)
    weight = layer.weight
    o, kernel, rank = weight.shape[0], tuple(weight.shape[2:]), direction.shape[0]
    penalty = check_penalty(penalty, o, rank, weight, numbers)
    check_numbers(numbers)

    bases, keys = [], []
    # Targets of one size in a row go through one convolution.
    for _, group in groupby(targets, key=lambda target: target.key.shape):
        key = torch.stack([target.key for target in group])  # B' x I x hk x wk
        base = conv_crop(layer, key, weight).flatten(2)  # B' x O x n
        projected = torch.einsum("ri,bihw->brhw", direction, key)  # B' x r x hk x wk
        bases.append(base.transpose(0, 1).flatten(1))  # O x (B' n)
        keys.append(unfold_keys(layer, projected).transpose(0, 1).flatten(1))  # K x (B' n)
    starts, noises, weights = [0], [], []
    for target in targets:
        h, w = target.goal.shape[1:]
        starts.append(starts[-1] + h * w)
        noises.append(weight.new_zeros(h * w) if target.noise is None else target.noise.flatten())
        if target.weight is None:
            weights.append(weight.new_full((h * w,), 1 / (h * w * len(targets))))
        else:
            w_u = target.weight.flatten()
            weights.append(w_u / w_u.sum() / len(targets))

    energy = cross = gram = None
    if layer.demodulate:
        square = (torch.stack([target.style for target in targets]) * layer.scale).square()  # B x I
        energy = square @ weight.square().flatten(2).sum(2).t() + DEMODULATION_EPSILON  # B x O
    if layer.demodulate and loop:
        modulated = (square[:, None, :] * direction).flatten(0, 1)  # (B r) x I
        cross = modulated @ weight.transpose(0, 1).flatten(1)  # (B r) x (O kh kw)
        cross = cross.reshape(len(targets), rank, o, -1).transpose(1, 2).flatten(2).contiguous()  # B x O x K
        gram = (modulated @ direction.t()).unflatten(0, (len(targets), rank))  # B x r x r

    return InsertionProblem(
        base=torch.cat(bases, 1),
        keys=torch.cat(keys, 1),
        goal=torch.cat([target.goal.flatten(1) for target in targets], 1),
        noise=torch.cat(noises),
        weight=torch.cat(weights),
        bias=weight.new_zeros(o) if layer.bias is None else layer.bias,
        starts=starts,
        energy=energy,
        cross=cross,
        gram=gram,
        penalty=penalty,
        kernel=kernel,
        negative_slope=layer.negative_slope,
        gain=layer.gain,
        shapes=[tuple(target.goal.shape[1:]) for target in targets],
        flipped=layer.blur is not None,
    )


def check_penalty(penalty: Penalty | None, o: int, rank: int, like: Tensor, later: Later) -> Penalty | None:
    """q (O) and the symmetric part of P (r x r), or None."""
    if penalty is None:
        return None
    if not (isinstance(penalty, tuple | list) and len(penalty) == 2):
        raise TypeError(f"penalty: expected a pair (q, P), got {type(penalty).__name__}")
    q = check_tensor("penalty[0] (q)", penalty[0], (o,), like, later)
    matrix = check_tensor("penalty[1] (P)", penalty[1], (rank, rank), like, later)
    return q, ((matrix + matrix.t()) / 2).contiguous()


# -- the reference loop ------------------------------------------------------------------------------------------------


def penalty_value(problem: InsertionProblem, lambda_: Tensor) -> Tensor:
    """mean_o q_o <Lambda_o, P Lambda_o>. lambda_: O x K."""
    if problem.penalty is None:
        return lambda_.new_zeros(())
    q, matrix = problem.penalty
    x = lambda_.unflatten(1, (problem.rank, -1))  # O x r x taps
    return (q * (x * (matrix @ x)).sum((1, 2))).mean()


def loss_and_gradient(problem: InsertionProblem, lambda_: Tensor) -> tuple[Tensor, Tensor]:
    """The data term and the gradient of data term plus penalty, by hand. lambda_: O x K -> scalar, O x K."""
    x = lambda_.unflatten(1, (problem.rank, -1))  # O x r x taps
    y = problem.base + lambda_ @ problem.keys  # O x N, before demodulation
    z = y
    if problem.energy is not None:
        counts = torch.tensor([b - a for a, b in problem.ranges], device=y.device)
        products = torch.matmul(problem.gram[:, None], x).flatten(2)  # B x O x K
        norm2 = problem.energy + ((2 * problem.cross + products) * lambda_).sum(2)  # B x O
        demod = norm2.rsqrt()  # B x O
        demod_u = demod.t().repeat_interleave(counts, 1, output_size=y.shape[1])  # O x N
        z = y * demod_u
    z = z + (problem.noise + problem.bias[:, None])
    v = torch.where(z > 0, z, problem.negative_slope * z) * problem.gain
    difference = v - problem.goal
    loss = (problem.weight * difference.abs()).sum() / len(y)
    by_z = torch.where(z > 0, 1.0, problem.negative_slope).to(z) * (problem.weight * (problem.gain / len(y)))
    by_z = by_z * difference.sign()  # dloss / dz, O x N
    if problem.energy is None:
        gradient = by_z @ problem.keys.t()
    else:
        gradient = (by_z * demod_u) @ problem.keys.t()
        by_demod = torch.stack(
            [(by_z[:, a:b] * y[:, a:b]).sum(1) for a, b in problem.ranges]
        )  # dloss / d demod, B x O;  d demod / d Lambda = -demod^3 (cross + gram Lambda)
        gradient = gradient - ((by_demod * demod**3)[:, :, None] * (problem.cross + products)).sum(0)
    if problem.penalty is not None:
        q, matrix = problem.penalty
        gradient = gradient + (2 / len(q)) * (q[:, None, None] * (matrix @ x)).flatten(1)
    return loss, gradient


def run_steps_ref(
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
    """Steps first ... first + count - 1 of Adam, in place, of one problem after the other.

    lambda_, exp_avg, exp_avg_sq: of each problem, O x K. losses: at least first + count.
    """
    beta1, beta2 = betas
    for problem, x, mean, square, loss in zip(problems, lambda_, exp_avg, exp_avg_sq, losses, strict=True):
        for step in range(first, first + count):
            loss[step], gradient = loss_and_gradient(problem, x)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (square.sqrt() / (1 - beta2 ** (step + 1)) ** 0.5).add_(eps)
            x.addcdiv_(mean, root, value=-lr / (1 - beta1 ** (step + 1)))


# -- the public functions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One edit of a batch: the arguments of `insert_low_rank` that are its own."""

    layer: ConvLayer
    direction: Tensor
    targets: InsertionTarget | Sequence[InsertionTarget]
    penalty: Penalty | None = None
    init: Tensor | None = None


def insert_low_rank(
    layer: ConvLayer,
    direction: Tensor,
    targets: InsertionTarget | Sequence[InsertionTarget],
    *,
    steps: int = 2001,
    lr: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    penalty: Penalty | None = None,
    init: Tensor | None = None,
    callback: Callback | None = None,
    impl: str | None = None,
) -> Insertion:
    """Minimise the L1 distance of the layer's values to the goals over W = W0 + Lambda D, with Adam from zero state.

    The loss of target b is sum_u w_u mean_o |v_ou - goal_ou| / sum_u w_u, over its pixels u and the output channels o;
    the loss is the mean over the targets. Bau et al. (ECCV 2020), equation 14 in the low-rank form; the updates are
    those of torch.optim.Adam.

    layer      see ConvLayer; its weight is W0, O x I x kh x kw. float32; float64 only where impl is "torch" or None
    direction  r x I (or I for rank 1), dtype and device of the weight
    targets    one InsertionTarget or several, of any sizes
    penalty    (q: O, P: r x r), adds mean_o q_o <Lambda_o, P Lambda_o> to what is minimised; not part of the losses
    init       O x r x kh x kw to start from; None: zero
    callback   callback(steps done, last loss), about every 80 ms and at the end. What it raises ends the loop and
               passes through
    impl       None: the kernel for the device and dtype, where there is one; "cpu", "cuda", "torch": exactly that one

    Returns an Insertion. No argument is changed. Raises TypeError, ValueError or NonFiniteError (a ValueError), naming
    the argument; RuntimeError where impl is not there.
    """

    def told(done: int, losses: list[float]) -> object:
        return callback(done, losses[0])

    (result,) = _insert_all(
        [Edit(layer, direction, targets, penalty, init)], [""], steps, lr, betas, eps,
        None if callback is None else told, impl,
    )  # fmt: skip
    return result


def insert_low_rank_batch(
    edits: Sequence[Edit],
    *,
    steps: int = 2001,
    lr: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    callback: BatchCallback | None = None,
    impl: str | None = None,
) -> list[Insertion]:
    """`insert_low_rank` for several edits that do not depend on one another, all together; the results are those of one
    after the other, bit for bit.

    edits     each with its own layer, direction, targets, penalty and init, all on one device and of one dtype. On a
              GPU, edits of one shape (channels, kernel, rank, sizes of the targets) run side by side, in one launch
    callback  callback(steps done, last loss of each edit)

    The other arguments and the errors are as in `insert_low_rank`; an error names the edit.
    """
    edits = list(edits)
    for n, edit in enumerate(edits):
        if not isinstance(edit, Edit):
            raise TypeError(f"edits[{n}]: expected an Edit, got {type(edit).__name__}")
    return _insert_all(edits, [f"edits[{n}]: " for n in range(len(edits))], steps, lr, betas, eps, callback, impl)


def _insert_all(
    edits: list[Edit],
    names: list[str],
    steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    callback: BatchCallback | None,
    impl: str | None,
) -> list[Insertion]:
    """The work of `insert_low_rank` and `insert_low_rank_batch`. names: what errors of an edit begin with."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer above 0, got {steps!r}")
    check_adam(lr, betas, eps)
    if not edits:
        return []
    problems, lambdas = [], []
    for edit, name in zip(edits, names, strict=True):
        with _named(name):
            problem = prepare(edit.layer, edit.direction, edit.targets, edit.penalty)
            o, k = len(problem.base), len(problem.keys)
            if edit.init is None:
                lambdas.append(problem.base.new_zeros(o, k))
            else:
                init = check_tensor("init", edit.init, (o, problem.rank, *problem.kernel), problem.base)
                lambdas.append(init.flatten(1).clone(memory_format=torch.contiguous_format))
            first = problems[0].base if problems else problem.base
            if problem.base.dtype != first.dtype or problem.base.device != first.device:
                raise TypeError(
                    f"layer.weight: expected {first.dtype} on {first.device}, as the first edit's, got "
                    f"{problem.base.dtype} on {problem.base.device}"
                )
        problems.append(problem)
    run = choose_steps(problems[0], impl)
    means, squares = ([torch.zeros_like(x) for x in lambdas] for _ in range(2))
    losses = [torch.zeros(steps, dtype=torch.float64, device=x.device) for x in lambdas]
    with torch.no_grad():
        done = 0
        # Without a callback a GPU takes all steps in one launch: there is nothing to wake up for.
        launch = impl == "cuda" or (impl is None and problems[0].base.is_cuda)
        for count in [steps] if launch and callback is None else paced(steps):
            run(problems, lambdas, means, squares, losses, done, count, lr, betas, eps)
            done += count
            if callback is not None:
                callback(done, torch.stack(losses)[:, done - 1].tolist())
        results = []
        for problem, x, loss, name in zip(problems, lambdas, losses, names, strict=True):
            if not all_finite(x):
                raise NonFiniteError(
                    f"{name}the insertion left the finite numbers within {steps} steps; a smaller lr than {lr} may help"
                )
            shape = (len(x), problem.rank, *problem.kernel)
            results.append(Insertion(x.reshape(shape), loss, penalty_value(problem, x).item()))
        return results


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts `name` before the message of an error about an argument."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}{error}") from error


def insert_low_rank_ref(
    layer: ConvLayer, direction: Tensor, targets: InsertionTarget | Sequence[InsertionTarget], **settings: object
) -> Insertion:
    """`insert_low_rank` in plain torch: the same arguments and result, on any device."""
    return insert_low_rank(layer, direction, targets, **{**settings, "impl": "torch"})


def check_adam(lr: float, betas: tuple[float, float], eps: float) -> None:
    """Raises ValueError unless these are settings that torch.optim.Adam takes."""
    if not lr > 0 or lr == float("inf"):
        raise ValueError(f"lr: expected a finite number above 0, got {lr!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")


def paced(steps: int) -> Sequence[int]:
    """Yield counts of steps that sum to `steps`, each sized by the time that the one before took."""
    count = min(steps, 4)
    while steps > 0:
        started = time.perf_counter()
        yield count
        seconds = max(time.perf_counter() - started, 1e-6)
        steps -= count
        count = min(steps, max(1, min(8 * count, int(count * CALLBACK_SECONDS / seconds))))


def choose_steps(problem: InsertionProblem, impl: str | None) -> Callable[..., None]:
    """The function that runs steps of problems like this one. Raises where `impl` is not there."""
    chosen = _library.resolve("insert_low_rank", impl, problem.base)
    return run_steps_ref if chosen == "torch" else functools.partial(run_steps, chosen)


@torch.no_grad()
def insertion_loss(
    layer: ConvLayer, direction: Tensor, targets: InsertionTarget | Sequence[InsertionTarget], lambda_: Tensor
) -> list[float]:
    """The loss of each target with W0 + Lambda D, as in `insert_low_rank`. lambda_: O x r x kh x kw."""
    layer, direction = check_layer(layer), check_direction(layer, direction)
    targets = check_targets(layer, targets)
    o, _, kh, kw = layer.weight.shape
    lambda_ = check_tensor("lambda_", lambda_, (o, len(direction), kh, kw), layer.weight)
    weight = layer.weight + torch.einsum("orhw,ri->oihw", lambda_, direction)
    return [target_loss(layer, target, weight).item() for target in targets]


def target_loss(layer: ConvLayer, target: InsertionTarget, weight: Tensor | None = None) -> Tensor:
    """The loss of one target with another weight (O x I x kh x kw) or the layer's own. Differentiable."""
    distance = (layer_values(layer, target, weight) - target.goal).abs().mean(0)  # h x w
    w_u = torch.ones_like(distance) if target.weight is None else target.weight
    return (w_u * distance).sum() / w_u.sum()
