"""Projection of a convolution's change onto a few input directions, alone or after a step of Adam.

``W <- W0 + (W - W0) D^T D`` over the input channels: the constraint of "Rewriting a Deep Generative Model" (Bau et
al., ECCV 2020, section 3.3), with the orthonormal rows of D spanning the keys that may change. One pass over the
weights, and one launch on a GPU for a whole list of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrewrite.ops import _library

Tensors = Tensor | Sequence[Tensor]


def project_ref(weight: Tensor, base: Tensor, direction: Tensor) -> Tensor:
    """Reference in plain torch: W0 + (W - W0) D^T D as a new tensor. Shapes as for project_."""
    axis = weight.ndim - 3  # of the input channels
    change = (weight - base).movedim(axis, -1)  # ... x I
    return base + (change @ direction.T @ direction).movedim(-1, axis)


def project_adam_ref(
    weight: Tensor, base: Tensor, direction: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *,
    step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, project: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Reference in plain torch of project_adam_: the new weight, exp_avg and exp_avg_sq."""
    exp_avg = exp_avg + (grad - exp_avg) * (1 - betas[0])
    exp_avg_sq = exp_avg_sq * betas[1] + grad * grad * (1 - betas[1])
    root = exp_avg_sq.sqrt() / math.sqrt(1 - betas[1] ** step) + eps
    weight = weight - lr / (1 - betas[0] ** step) * (exp_avg / root)
    return (project_ref(weight, base, direction) if project else weight), exp_avg, exp_avg_sq


def project(weight: Tensor, base: Tensor, direction: Tensor, *, impl: str | None = None) -> Tensor:
    """The projected weight as a new tensor; differentiable in all three. Arguments as for project_, one weight."""
    return _project(weight, base, direction, impl)


def project_(weight: Tensors, base: Tensors, direction: Tensors, *, impl: str | None = None) -> Tensors:
    """Project each weight's change from `base`, in place: W <- W0 + (W - W0) D^T D. Returns `weight`.

    weight: O x I x kh x kw (or 1 x O x I x kh x kw), or a list of such, of different shapes if need be; base: the
    same shapes; direction: r x I with orthonormal rows (not checked), one for all or a list. float32 in the kernels,
    any floating-point type in torch, any strides. A weight equal to its base stays equal. NaN in a
    weight or base spreads over its output channel.

    Raises ValueError or TypeError where they do not fit, MissingKernelError for an `impl` that is not there; nothing
    is written then.
    """
    weights, bases, directions = _lists(weight, base, direction)
    _refuse_grad("project_", weights)
    if weights:
        _project_(weights, bases, directions, impl)
    return weight


def project_adam_(
    weight: Tensors, base: Tensors, direction: Tensors, grad: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, *,
    step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, project: bool = True,
    impl: str | None = None,
) -> Tensors:  # fmt: skip
    """One step of Adam (as torch.optim.Adam without weight decay), then the projection, in place. Returns `weight`.

    grad, exp_avg and exp_avg_sq have the weights' shapes; `step` is 1 at the first step. exp_avg and exp_avg_sq,
    updated too, are those of the unprojected weight. With ``project=False`` it is the Adam step alone, and `base` and
    `direction` are only checked. Otherwise as project_.
    """
    weights, bases, directions = _lists(weight, base, direction)
    grads, averages, squares = (_list(t, n, len(weights)) for t, n in
                                ((grad, "grad"), (exp_avg, "exp_avg"), (exp_avg_sq, "exp_avg_sq")))  # fmt: skip
    _refuse_grad("project_adam_", [*weights, *averages, *squares])
    if weights:
        _project_adam_(weights, bases, directions, grads, averages, squares, step, lr, *betas, eps, project, impl)
    return weight


@_library.torch_operator("pyrewrite::project_", mutates=("weight",))
def _project_(weight: list[Tensor], base: list[Tensor], direction: list[Tensor], impl: str | None = None) -> None:
    _check(weight, {"base": base}, direction, impl)
    chosen = _library.resolve("project_", impl, weight[0])
    if chosen == "torch":
        for w, b, d in zip(weight, base, direction, strict=True):
            w.copy_(project_ref(w, b, d))
        return
    _run(chosen, [weight, base], direction, None)


@_project_.register_fake
def _(weight: list[Tensor], base: list[Tensor], direction: list[Tensor], impl: str | None = None) -> None:
    _check(weight, {"base": base}, direction, impl)


@_library.torch_operator("pyrewrite::project_adam_", mutates=("weight", "exp_avg", "exp_avg_sq"))
def _project_adam_(
    weight: list[Tensor], base: list[Tensor], direction: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor], step: int, lr: float, beta1: float, beta2: float, eps: float, project: bool,
    impl: str | None = None,
) -> None:  # fmt: skip
    others = {"base": base, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    _check(weight, others, direction, impl)
    _check_adam(step, lr, beta1, beta2, eps)
    chosen = _library.resolve("project_adam_", impl, weight[0])
    if chosen == "torch":
        for w, b, d, g, m, v in zip(weight, base, direction, grad, exp_avg, exp_avg_sq, strict=True):
            settings = {"step": step, "lr": lr, "betas": (beta1, beta2), "eps": eps, "project": project}
            for old, new in zip((w, m, v), project_adam_ref(w, b, d, g, m, v, **settings), strict=True):
                old.copy_(new)
        return
    adam = _library.native().Adam(step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, project=project)
    _run(chosen, [weight, base, grad, exp_avg, exp_avg_sq], direction, adam)


@_project_adam_.register_fake
def _(
    weight: list[Tensor], base: list[Tensor], direction: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor], step: int, lr: float, beta1: float, beta2: float, eps: float, project: bool,
    impl: str | None = None,
) -> None:  # fmt: skip
    _check(weight, {"base": base, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, direction, impl)
    _check_adam(step, lr, beta1, beta2, eps)


@_library.torch_operator("pyrewrite::project")
def _project(weight: Tensor, base: Tensor, direction: Tensor, impl: str | None = None) -> Tensor:
    _check([weight], {"base": [base]}, [direction], impl)
    result = weight.clone()
    _project_([result], [base], [direction], impl)
    return result


@_project.register_fake
def _(weight: Tensor, base: Tensor, direction: Tensor, impl: str | None = None) -> Tensor:
    _check([weight], {"base": [base]}, [direction], impl)
    return torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, grad: Tensor):
    weight, base, direction = ctx.saved_tensors
    axis = weight.ndim - 3
    g = grad.movedim(axis, -1)  # ... x I
    grad_weight = g @ direction.T @ direction
    grad_direction = None
    if ctx.needs_input_grad[2]:
        channels = weight.shape[axis]
        change = (weight - base).movedim(axis, -1).reshape(-1, channels)  # M x I
        mixed = change.T @ g.reshape(-1, channels)  # I x I
        grad_direction = direction @ (mixed + mixed.T)
    return grad_weight.movedim(-1, axis), (g - grad_weight).movedim(-1, axis), grad_direction, None


_project.register_autograd(_backward, setup_context=_setup_context)


def _list(value: Tensors, name: str, count: int) -> list[Tensor]:
    values = [value] if isinstance(value, Tensor) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} must hold one tensor for each weight: {count}, got {len(values)}")
    return values


def _lists(weight: Tensors, base: Tensors, direction: Tensors) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    count = len(weights)
    directions = [direction] * count if isinstance(direction, Tensor) else _list(direction, "direction", count)
    return weights, _list(base, "base", count), directions


def _refuse_grad(name: str, written: list[Tensor]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in written):
        raise RuntimeError(f"{name} writes in place and has no gradient: call it under torch.no_grad()")


def _check(weight: list[Tensor], others: dict[str, list[Tensor]], direction: list[Tensor], impl: str | None) -> None:
    _library.check_impl(impl)
    if not len(weight) == len(direction) == len(others["base"]):
        raise ValueError("there must be one base and one direction for each weight")
    first = weight[0]
    if not first.dtype.is_floating_point:
        raise TypeError(f"weight must be floating point, got {_name(first.dtype)}")
    for n, w in enumerate(weight):
        shape = tuple(w.shape)
        if w.ndim not in (4, 5) or (w.ndim == 5 and shape[0] != 1):
            raise ValueError(f"weight must be O x I x kh x kw or 1 x O x I x kh x kw, got shape {shape}")
        if any(size > 1 and stride == 0 for size, stride in zip(shape, w.stride(), strict=True)):
            raise ValueError("weight is an expanded tensor, whose elements share memory; it cannot be written")
        for name, tensors in others.items():
            if tuple(tensors[n].shape) != shape:
                raise ValueError(f"{name} must have the weight's shape {shape}, got {tuple(tensors[n].shape)}")
        channels = shape[-3]
        if direction[n].ndim != 2 or direction[n].shape[1] != channels:
            raise ValueError(
                f"direction must be r x {channels} for a weight of shape {shape}, got {tuple(direction[n].shape)}"
            )
        for name, tensor in [("weight", w), *((k, t[n]) for k, t in others.items()), ("direction", direction[n])]:
            if tensor.dtype != first.dtype:
                raise TypeError(f"{name} must be {_name(first.dtype)} as the first weight, got {_name(tensor.dtype)}")
            if tensor.device != first.device:
                raise ValueError(f"{name} must be on {first.device} as the first weight, got {tensor.device}")


def _check_adam(step: int, lr: float, beta1: float, beta2: float, eps: float) -> None:
    if step < 1:
        raise ValueError(f"step must be 1 or more (1 at the first step), got {step}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be in [0, 1), got ({beta1}, {beta2})")
    if not (math.isfinite(lr) and lr >= 0 and math.isfinite(eps) and eps >= 0):
        raise ValueError(f"lr and eps must be finite and not negative, got {lr} and {eps}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(chosen: str, tensors: list[list[Tensor]], direction: list[Tensor], adam) -> None:
    """tensors: the weights, the bases and, for Adam, the gradients and both averages."""
    module = _library.native()
    weights = []
    for *row, d in zip(*tensors, direction, strict=True):
        row = [t[0] if t.ndim == 5 else t for t in row]  # O x I x kh x kw
        places = [(t.data_ptr(), t.stride()) for t in row]
        weights.append(module.Weight(tuple(row[0].shape), places, (d.data_ptr(), d.stride()), d.shape[0]))
    if chosen == "cpu":
        module.project_cpu(weights, adam, torch.get_num_threads())
    else:
        module.project_cuda(weights, adam, *_library.launch_place(tensors[0][0]))
