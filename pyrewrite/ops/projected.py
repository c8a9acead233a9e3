"""Insertion by projected gradient descent, the published default: Adam on the whole weight, projected every few steps.

Bau et al., "Rewriting a Deep Generative Model" (ECCV 2020), section 3.3. Between two projections the weight moves
freely, so the losses on the way are those of weights that are thrown away; what counts is the loss after the last
projection (`final_loss`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrewrite._finite import all_finite
from pyrewrite.errors import NonFiniteError
from pyrewrite.ops.insertion import Callback, check_adam, paced, target_loss
from pyrewrite.ops.insertion_geometry import (
    DEMODULATION_EPSILON,
    ConvLayer,
    InsertionTarget,
    check_direction,
    check_layer,
    check_targets,
    unfold_keys,
)
from pyrewrite.ops.projection import project_adam_


@dataclass(frozen=True)
class ProjectedInsertion:
    """The result of `insert_projected`.

    lambda_     O x r x kh x kw, with W = W0 + Lambda D after the last projection
    losses      steps, float64, each recorded before its step, of the weight as it then is, projected or not
    final_loss  the loss of the weight left behind
    """

    lambda_: Tensor
    losses: Tensor
    final_loss: float


@torch.no_grad()
def insert_projected(
    layer: ConvLayer,
    direction: Tensor,
    targets: InsertionTarget | Sequence[InsertionTarget],
    *,
    steps: int = 2001,
    project_every: int = 10,
    lr: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    callback: Callback | None = None,
    impl: str | None = None,
) -> ProjectedInsertion:
    """Adam on the whole weight W, with W <- W0 + (W - W0) D^T D over the input channels after steps 0, project_every,
    ... and the last.

    The state of Adam is not projected. Loss, arguments, callback and errors as in `insert_low_rank`; direction (r x I)
    needs orthonormal rows. No argument is changed.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer above 0, got {steps!r}")
    if not isinstance(project_every, int) or project_every < 1:
        raise ValueError(f"project_every: expected an integer above 0, got {project_every!r}")
    check_adam(lr, betas, eps)
    layer = check_layer(layer)
    direction = check_direction(layer, direction)
    targets = check_targets(layer, targets)
    identity = torch.eye(len(direction), dtype=direction.dtype, device=direction.device)
    if (direction @ direction.t() - identity).abs().max() > 1e-3:
        raise ValueError("direction: expected orthonormal rows, as a projection needs them")
    gradient = WeightGradient(layer, targets)
    weight = layer.weight.clone(memory_format=torch.contiguous_format)  # O x I x kh x kw
    exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
    losses = torch.zeros(steps, dtype=torch.float64, device=weight.device)
    buffers = (layer.weight, direction, gradient.by_weight.view_as(weight), exp_avg, exp_avg_sq)
    done = 0
    for count in paced(steps):
        for step in range(done, done + count):
            losses[step] = gradient(weight)
            project = step % project_every == 0 or step == steps - 1
            project_adam_(weight, *buffers, step=step + 1, lr=lr, betas=betas, eps=eps, project=project, impl=impl)
        done += count
        if callback is not None:
            callback(done, losses[done - 1].item())
    if not all_finite(weight):
        raise NonFiniteError(
            f"the insertion left the finite numbers within {steps} steps; a smaller lr than {lr} may help"
        )
    lambda_ = torch.einsum("oihw,ri->orhw", weight - layer.weight, direction)
    left = layer.weight + torch.einsum("orhw,ri->oihw", lambda_, direction)
    final = sum(target_loss(layer, target, left).item() for target in targets) / len(targets)
    return ProjectedInsertion(lambda_.contiguous(), losses, final)


class WeightGradient:
    """The loss of all targets and its gradient by the whole weight, by hand, in buffers that are made once.

    Calling it with a weight (O x I x kh x kw, contiguous) returns the loss and fills `by_weight` (O x M, M = I kh kw).
    """

    def __init__(self, layer: ConvLayer, targets: Sequence[InsertionTarget]) -> None:
        like = layer.weight
        o, _, kh, kw = like.shape
        columns = [target.goal[0].numel() for target in targets]
        self.ranges = [(sum(columns[:b]), sum(columns[: b + 1])) for b in range(len(columns))]
        self.keys = torch.cat([unfold_keys(layer, target.key[None])[0] for target in targets], 1)  # M x N
        self.keys_t = self.keys.t().contiguous()  # N x M
        self.goal = torch.cat([target.goal.flatten(1) for target in targets], 1)  # O x N
        noise = [
            like.new_zeros(n) if t.noise is None else t.noise.flatten() for t, n in zip(targets, columns, strict=True)
        ]
        self.shift = torch.cat(noise).expand(o, -1).clone()  # noise and bias, O x N
        if layer.bias is not None:
            self.shift += layer.bias[:, None]
        weights = [
            like.new_ones(n) if t.weight is None else t.weight.flatten() for t, n in zip(targets, columns, strict=True)
        ]
        self.pixel = torch.cat([w / w.sum() / (len(targets) * o) for w in weights])  # N
        self.slope, self.gain = layer.negative_slope, layer.gain
        self.y = torch.empty_like(self.goal)  # O x N, and three more of that size
        self.z, self.by_z, self.factor = (torch.empty_like(self.y) for _ in range(3))
        self.by_weight = like.new_empty(o, self.keys.shape[0])
        self.square = None
        if layer.demodulate:
            square = torch.stack([target.style for target in targets]).mul(layer.scale).square()  # B x I
            self.square = square.repeat_interleave(kh * kw, 1)  # B x M
            self.scratch = torch.empty_like(self.by_weight)
            self.demod_u = torch.empty_like(self.y)

    def __call__(self, weight: Tensor) -> Tensor:
        w, y, z, by_z, factor = weight.view(len(self.y), -1), self.y, self.z, self.by_z, self.factor
        torch.mm(w, self.keys, out=y)
        if self.square is None:
            torch.add(y, self.shift, out=z)
        else:
            torch.mul(w, w, out=self.scratch)
            demod = (self.scratch @ self.square.t()).add_(DEMODULATION_EPSILON).rsqrt_()  # O x B
            for b, (start, stop) in enumerate(self.ranges):
                self.demod_u[:, start:stop] = demod[:, b : b + 1]
            torch.addcmul(self.shift, y, self.demod_u, out=z)
        # The slope of the leaky ReLU with the gain: z > 0 -> gain, else gain * slope.
        torch.gt(z, 0, out=factor)
        factor.mul_(self.gain * (1 - self.slope)).add_(self.gain * self.slope)
        z.mul_(factor).sub_(self.goal)  # now the difference to the goal
        loss = z.abs().sum(0).dot(self.pixel)
        torch.sign(z, out=by_z)
        by_z.mul_(factor).mul_(self.pixel)  # dloss / d(y demod)
        if self.square is None:
            torch.mm(by_z, self.keys_t, out=self.by_weight)
            return loss
        torch.mul(by_z, y, out=z)
        by_demod = torch.stack([z[:, a:b].sum(1) for a, b in self.ranges], 1)  # O x B
        torch.mm(by_z.mul_(self.demod_u), self.keys_t, out=self.by_weight)
        # d demod / dW = -demod^3 square W
        torch.mm(by_demod.mul_(demod.pow_(3)).neg_(), self.square, out=self.scratch)
        self.by_weight.addcmul_(self.scratch, w)
        return loss
