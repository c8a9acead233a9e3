"""The projection, alone and after a step of Adam, and its peers."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.core import Case, Way, compiled, relative_error
from pyrewrite.ops import project_, project_adam_, project_adam_ref, project_ref

BYTES = {"alone": 12, "with Adam": 32, "Adam alone": 28}  # an element: what is read and written once
BOUND = 1e-6


def einsum_pair(weight: Tensor, base: Tensor, direction: Tensor) -> Tensor:
    """The published form; `weight` is written."""
    lambda_ = torch.einsum("oihw,ri->orhw", weight - base, direction)
    return weight.copy_(base + torch.einsum("orhw,ri->oihw", lambda_, direction))


def case(device: str, size: dict) -> Case:
    """`size`: shape of the weight, rank, kind (a key of BYTES) and perhaps the number of layers in a call."""
    torch.manual_seed(0)
    shape, rank, kind, layers = tuple(size["shape"]), size["rank"], size["kind"], size.get("layers", 1)
    start, base, grad = (torch.rand(layers, *shape, device=device) for _ in range(3))
    exp_avg, exp_avg_sq = torch.zeros_like(start), torch.zeros_like(start)  # as an optimizer of torch starts
    direction = torch.linalg.qr(torch.randn(shape[1], rank, device=device))[0].T.contiguous()  # r x I
    settings = {"step": 1, "lr": 1e-3, "project": kind != "Adam alone"}

    wide = [t.double() for t in (start[0], base[0], direction, grad[0], exp_avg[0], exp_avg_sq[0])]
    truth = project_ref(*wide[:3]) if kind == "alone" else project_adam_ref(*wide, **settings)[0]

    def error(result: Tensor) -> float:
        return relative_error(result, truth)

    # Each way has its own state. Its first run, which is the one that is checked, begins at `start`.
    ways = []

    def add(name: str, run) -> None:
        state = [t.clone() for t in (start, exp_avg, exp_avg_sq)]
        ways.append(Way(name, lambda: run(*(t.unbind() for t in state)), error))

    if kind == "alone":
        compiled_ref = compiled(project_ref)
        add("pyrewrite", lambda w, m, v: project_(list(w), list(base), direction)[0])

        def each(function, w) -> Tensor:
            for a, b in zip(w, base, strict=True):
                function(a, b)
            return w[0]

        add("einsum pair", lambda w, m, v: each(lambda a, b: einsum_pair(a, b, direction), w))
        add("torch.compile", lambda w, m, v: each(lambda a, b: a.copy_(compiled_ref(a, b, direction)), w))
    else:

        def ours(w, m, v) -> Tensor:
            return project_adam_(list(w), list(base), direction, list(grad), list(m), list(v), **settings)[0]

        parameters = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = torch.optim.Adam(parameters, lr=settings["lr"], fused=True)
        for parameter, g in zip(parameters, grad, strict=True):
            parameter.grad = g.clone()

        @torch.no_grad()
        def stock(w, m, v) -> Tensor:
            optimizer.step()
            if settings["project"]:
                for a, b in zip(parameters, base, strict=True):
                    einsum_pair(a, b, direction)
            return parameters[0].detach()

        compiled_ref = compiled(project_adam_ref)

        def traced(w, m, v) -> Tensor:
            for n in range(layers):
                new = compiled_ref(w[n], base[n], direction, grad[n], m[n], v[n], **settings)
                for old, value in zip((w[n], m[n], v[n]), new, strict=True):
                    old.copy_(value)
            return w[0]

        add("pyrewrite", ours)
        add("torch's fused Adam and the einsum pair" if settings["project"] else "torch's fused Adam", stock)
        add("torch.compile", traced)
    elements = start.numel()
    flop = 4 * rank * elements * settings["project"] + (12 * elements if kind != "alone" else 0)
    many = f"{layers} of " if layers > 1 else ""
    label = f"{many}{'x'.join(map(str, shape))}, rank {rank}, {kind}"
    return Case("projection", label, device, BYTES[kind] * elements, flop, "fp32", BOUND, ways)
