"""Layers, targets and slow but plain solutions that the insertion's tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrewrite.ops import ConvLayer, InsertionTarget, key_size
from pyrewrite.ops.insertion import prepare, target_loss

FIELDS = ("key", "goal", "style", "noise", "weight")


def blur_filter(taps: int) -> Tensor:
    """A filter that is not symmetric, so that a missing flip shows."""
    row = torch.rand(taps, dtype=torch.float64) + 0.5
    return 4 * row[:, None] * row / row.sum() ** 2


def case(
    *,
    o: int = 6,
    i: int = 5,
    rank: int = 2,
    kernel: tuple[int, int] = (3, 3),
    taps: int = 0,
    demodulate: bool = False,
    activate: bool = True,
    sizes: Sequence[tuple[int, int]] = ((4, 6), (2, 4), (4, 6)),
    seed: int = 0,
) -> tuple[ConvLayer, Tensor, list[InsertionTarget]]:
    """A float64 layer (taps > 0: up-sampling), orthonormal directions, and targets, every second one with weights."""
    torch.manual_seed(seed)
    weight = torch.randn(o, i, *kernel, dtype=torch.float64)
    layer = ConvLayer(
        weight,
        scale=1 / math.sqrt(weight[0].numel()),
        demodulate=demodulate,
        blur=blur_filter(taps) if taps else None,
        bias=0.3 * torch.randn(o, dtype=torch.float64) if activate else None,
        negative_slope=0.2 if activate else 1.0,
        gain=math.sqrt(2) if activate else 1.0,
    )
    targets = []
    for n, (h, w) in enumerate(sizes):
        weights = torch.rand(h, w, dtype=torch.float64)
        weights[0, 0] = weights[-1, -1] = 0  # some pixels do not count
        weights[0, -1] = 1
        targets.append(
            InsertionTarget(
                key=torch.randn(i, *key_size(layer, h, w), dtype=torch.float64),
                goal=torch.randn(o, h, w, dtype=torch.float64),
                style=torch.rand(i, dtype=torch.float64) + 0.5 if demodulate else None,
                noise=0.1 * torch.randn(h, w, dtype=torch.float64) if activate else None,
                weight=weights if n % 2 else None,
            )
        )
    direction = torch.linalg.qr(torch.randn(i, rank, dtype=torch.float64))[0].t().contiguous()  # r x I
    return layer, direction, targets


def penalty_for(o: int, rank: int) -> tuple[Tensor, Tensor]:
    root = torch.randn(rank, rank, dtype=torch.float64)
    return torch.rand(o, dtype=torch.float64), (root @ root.t()).t().contiguous().t()  # column-major


def cast(layer: ConvLayer, direction: Tensor, targets: list[InsertionTarget], dtype: torch.dtype = torch.float32):
    """The same case in another dtype."""

    def to(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    layer = ConvLayer(
        to(layer.weight), layer.scale, layer.demodulate, to(layer.blur), to(layer.bias), layer.negative_slope,
        layer.gain, layer.padding,
    )  # fmt: skip
    return layer, to(direction), [InsertionTarget(*(to(getattr(t, name)) for name in FIELDS)) for t in targets]


def full_weight(layer: ConvLayer, direction: Tensor, lambda_: Tensor) -> Tensor:
    return layer.weight + torch.einsum("orhw,ri->oihw", lambda_, direction)


def autograd_low_rank(layer, direction, targets, steps: int, lr: float = 0.05, penalty=None, init=None):
    """The published algorithm as it is written: the whole weight under autograd, the whole keys, torch's Adam."""
    o, _, kh, kw = layer.weight.shape
    start = torch.zeros(o, len(direction), kh, kw, dtype=layer.weight.dtype) if init is None else init.clone()
    lambda_ = start.requires_grad_(True)
    optimizer = torch.optim.Adam([lambda_], lr=lr)
    losses = []
    for _ in range(steps):
        weight = full_weight(layer, direction, lambda_)
        loss = sum(target_loss(layer, target, weight) for target in targets) / len(targets)
        losses.append(loss.item())
        if penalty is not None:
            x = lambda_.flatten(2)
            loss = loss + (penalty[0] * (x * (penalty[1] @ x)).sum((1, 2))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lambda_.detach(), torch.tensor(losses, dtype=torch.float64)


def operator_arguments(layer, direction, targets, first: int = 0, count: int = 3) -> tuple:
    """The arguments of `insertion_steps_` for one edit, from zero state."""
    p = prepare(layer, direction, targets)
    state = [torch.zeros(len(p.base), len(p.keys)) for _ in range(3)]
    nothing = p.base.new_empty(0)
    problem = [p.base, p.keys, p.goal, p.noise, p.weight, p.bias, p.energy, p.cross, p.gram, None, None]
    tensors = [nothing if x is None else x for x in (*state, torch.zeros(count, dtype=torch.float64), *problem)]
    settings = [[len(p.shapes)], [size for shape in p.shapes for size in shape], [p.rank], [p.negative_slope], [p.gain]]
    settings += [list(p.kernel), [p.flipped], first, count, 0.05, 0.9, 0.999, 1e-8]
    return (*([x] for x in tensors), *settings)
