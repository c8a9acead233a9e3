"""The insertion and its peers: the same Adam steps as the published code takes them, and as stock torch can at best."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core import Case, Way, relative_error
from pyrewrite.ops import ConvLayer, InsertionTarget, insert_low_rank
from pyrewrite.ops.insertion import prepare

SLOPE, GAIN = 0.2, math.sqrt(2)


def problem(rank: int, count: int, height: int, width: int, channels: int, device: str = "cpu"):
    """A demodulated StyleGAN2 layer with 3 x 3 kernels, directions, and `count` targets of height x width."""
    torch.manual_seed(0)
    layer = ConvLayer(
        torch.randn(channels, channels, 3, 3),
        scale=1 / math.sqrt(channels * 9),
        demodulate=True,
        bias=0.1 * torch.randn(channels),
        negative_slope=SLOPE,
        gain=GAIN,
    )
    targets = [
        InsertionTarget(
            key=torch.randn(channels, height + 2, width + 2),
            goal=torch.randn(channels, height, width),
            style=torch.rand(channels) + 0.5,
            noise=0.02 * torch.randn(height, width),
        )
        for _ in range(count)
    ]
    direction = torch.linalg.qr(torch.randn(channels, rank))[0].t().contiguous()
    return _to(layer, device), direction.to(device), [_to(t, device) for t in targets]


def published(layer: ConvLayer, direction: Tensor, targets: list[InsertionTarget], steps: int) -> Tensor:
    """Losses of Adam on Lambda, the whole weight under autograd. Targets share one batched convolution."""
    lambda_ = torch.zeros(
        len(layer.weight), len(direction), 3, 3, dtype=direction.dtype, device=direction.device, requires_grad=True
    )
    keys = torch.stack([t.key for t in targets])
    goals = torch.stack([t.goal for t in targets])
    square = torch.stack([t.style for t in targets]).square()  # B x I
    shift = torch.stack([t.noise for t in targets])[:, None] + layer.bias[:, None, None]
    optimizer = torch.optim.Adam([lambda_], lr=0.05)
    losses = direction.new_zeros(steps)
    for step in range(steps):
        weight = layer.weight + torch.einsum("orhw,ri->oihw", lambda_, direction)
        demod = torch.rsqrt(layer.scale**2 * (square @ weight.square().sum((2, 3)).t()) + 1e-8)
        x = F.conv2d(keys, weight) * layer.scale * demod[:, :, None, None]
        loss = F.l1_loss(F.leaky_relu(x + shift, SLOPE) * GAIN, goals)
        losses[step] = loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def low_rank_autograd(layer: ConvLayer, direction: Tensor, targets: list[InsertionTarget], steps: int) -> Tensor:
    """The same with conv(key, W0) and D key computed once, and the demodulation through its quadratic form."""
    p = prepare(layer, direction, targets)
    lambda_ = direction.new_zeros(len(p.base), len(p.keys), requires_grad=True)
    optimizer = torch.optim.Adam([lambda_], lr=0.05)
    losses = direction.new_zeros(steps)
    pixels = p.base.shape[1] // len(targets)
    for step in range(steps):
        products = torch.matmul(p.gram[:, None], lambda_.unflatten(1, (p.rank, -1))).flatten(2)  # B x O x K
        demod = (p.energy + ((2 * p.cross + products) * lambda_).sum(2)).rsqrt()  # B x O
        x = torch.addmm(p.base, lambda_, p.keys) * demod.t().repeat_interleave(pixels, 1)
        loss = F.l1_loss(F.leaky_relu(x + (p.noise + p.bias[:, None]), SLOPE) * GAIN, p.goal)
        losses[step] = loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def cuda_graph(layer: ConvLayer, direction: Tensor, targets: list[InsertionTarget], steps: int) -> Tensor:
    """low_rank_autograd with a step captured once and replayed: the best stock form on a GPU."""
    p = prepare(layer, direction, targets)
    device = p.base.device
    lambda_ = torch.zeros(len(p.base), len(p.keys), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([lambda_], lr=0.05, capturable=True, fused=True)
    pixels = p.base.shape[1] // len(targets)
    last = torch.zeros((), device=device)

    def step() -> None:
        products = torch.matmul(p.gram[:, None], lambda_.unflatten(1, (p.rank, -1))).flatten(2)  # B x O x K
        demod = (p.energy + ((2 * p.cross + products) * lambda_).sum(2)).rsqrt()  # B x O
        x = torch.addmm(p.base, lambda_, p.keys) * demod.t().repeat_interleave(pixels, 1, output_size=p.base.shape[1])
        loss = F.l1_loss(F.leaky_relu(x + (p.noise + p.bias[:, None]), SLOPE) * GAIN, p.goal)
        last.copy_(loss.detach())
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()

    lambda_.grad = torch.zeros_like(lambda_)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up outside the capture, as torch asks for; its steps are undone
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        lambda_.zero_()
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    losses = torch.zeros(steps, device=device)
    for n in range(steps):
        graph.replay()
        losses[n] = last
    return losses


def case(device: str, size: dict) -> Case:
    """`size`: channels, rank, targets, height, width, steps, and of how many steps the peers are timed (sample)."""
    steps, sample, rank, count = size["steps"], size["sample"], size["rank"], size["targets"]
    layer, direction, targets = problem(rank, count, size["height"], size["width"], size["channels"], device)
    wide = published(_to(layer, torch.float64), direction.double(), [_to(t, torch.float64) for t in targets], sample)

    def error(losses: Tensor) -> float:
        """Of the loss curve, over the steps that were taken."""
        return relative_error(losses[:sample].double().cpu(), wide.cpu())

    arguments = (layer, direction, targets)
    ways = [
        Way("pyrewrite", lambda: insert_low_rank(*arguments, steps=steps).losses, error),
        Way("published", lambda: published(*arguments, sample), error, steps / sample),
        Way("low-rank autograd", lambda: low_rank_autograd(*arguments, sample), error, steps / sample),
    ]
    missing = {}
    if device == "cuda":
        ways.append(Way("low-rank autograd in a CUDA graph", lambda: cuda_graph(*arguments, steps), error))
    else:
        missing["low-rank autograd in a CUDA graph"] = "needs a GPU"
    pixels = count * size["height"] * size["width"]
    flop = 4 * size["channels"] * rank * 9 * pixels * steps  # two products a step
    traffic = 4 * (2 * size["channels"] * pixels + rank * pixels + 2 * size["channels"] * rank * 9)
    label = f"{size['channels']} channels, rank {rank}, {count} x {size['height']}x{size['width']}, {steps} steps"
    return Case("insertion", label, device, traffic, flop, "fp32", 2e-3, ways, missing)


def _to(value, *where):
    """A layer or a target with its tensors on another device or of another data type."""
    tensors = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    moved = {name: t.to(*where) for name, t in tensors.items() if isinstance(t, Tensor)}
    return dataclasses.replace(value, **moved)
