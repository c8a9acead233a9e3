"""From a context to directions: which part of the keys an edit may use (paper, section 3.3 and equation 12).

Every method returns D, r x I. For "zca" its rows are orthonormal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._finite import all_finite
from ..errors import EditError
from ..statistics import SecondMoment, UnitQuantiles


def masked_keys(examples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Examples (key map I x h x w, area h x w) -> keys N x I float64 and weights N of the pixels with area > 0."""
    keys, weights = [], []
    for key, area in examples:
        inside = area > 0  # h x w
        keys.append(key.double()[:, inside].t())  # n x I
        weights.append(area.double().to(key.device)[inside])  # n
    return torch.cat(keys), torch.cat(weights)


def context_directions(
    moment: SecondMoment,
    examples: Sequence[tuple[Tensor, Tensor]],
    *,
    rank: int = 1,
    method: str = "zca",
    shrinkage: float = 0.0,
    quantiles: UnitQuantiles | None = None,
    protect: Tensor | None = None,
) -> Tensor:
    """Context examples -> directions D, r x I float32.

    moment: second moment C of the layer's keys. examples: (key map I x h x w, area h x w in [0, 1]) of each context
    image. rank: r. method: "zca" (whitened keys, SVD, whitened again, orthonormalised), "mean" (C^-1 of the mean
    key, rank 1), "svd" (of the keys C^-1 k), "gandissect" (unit vectors of the r most unusual units; needs
    `quantiles`). shrinkage: see SecondMoment.whitener. protect: m x I orthonormal rows of whitened key space that D may
    not touch, see `protected_subspace`; "zca" only.
    Raises EditError when the context has fewer painted key pixels than r, or the keys are not finite.
    """
    keys, weights = masked_keys(examples)  # N x I, N
    if len(keys) < rank:
        raise EditError(
            f"rank {rank} is more than the {len(keys)} key pixels under the context's masks: "
            "expected a smaller rank or larger masks"
        )
    if rank > keys.shape[1]:
        raise EditError(f"rank {rank} is more than the layer's {keys.shape[1]} input channels")
    if protect is not None and method != "zca":
        raise EditError(f"protect works with key method 'zca', not with {method!r}")
    if not all_finite(keys):
        raise EditError("the keys under the context's masks are not finite (NaN or infinity in the activations)")
    if method == "zca":
        whitener = moment.whitener(shrinkage).to(keys.device)  # I x I
        whitened = weights[:, None] * (keys @ whitener)  # N x I
        if protect is not None:
            # Before the SVD, so that the r directions are the best of those that are left.
            free = torch.linalg.matrix_rank(whitened).item() if len(whitened) < whitened.shape[1] else whitened.shape[1]
            if rank > free - len(protect):
                raise EditError(
                    f"rank {rank} with {len(protect)} protected dimensions is more than the context's {free} key "
                    "dimensions: expected a smaller rank or protect_rank, or larger masks"
                )
            whitened = whitened - (whitened @ protect.t()) @ protect
        directions = _top_singular(whitened, rank) @ whitener  # r x I
        basis = torch.linalg.qr(directions.t()).Q.t()  # r x I, orthonormal rows
        agreement = basis @ whitened.sum(0)  # r
        basis = torch.where(agreement[:, None] < 0, -basis, basis)
    elif method == "mean":
        if rank != 1:
            raise EditError(f"key method 'mean' gives one direction, rank {rank} was asked for")
        mean = (weights[:, None] * keys).sum(0) / weights.sum()  # I
        basis = torch.nn.functional.normalize(moment.power(-1.0, shrinkage).to(keys.device) @ mean, dim=0)[None]
    elif method == "svd":
        adjusted = (weights[:, None] * keys) @ moment.power(-1.0, shrinkage).to(keys.device)  # N x I
        basis = _top_singular(adjusted, rank)
        if adjusted.mean(0) @ basis[0] < 0:
            basis[0] = -basis[0]
    elif method == "gandissect":
        if quantiles is None:
            raise EditError("key method 'gandissect' needs the quantiles of the units (collect(..., quantiles=True))")
        ranks = quantiles.rank(keys)  # N x I in (0, 1), never 1
        score = (weights[:, None] * -torch.log1p(-ranks.to(keys))).sum(0) / weights.sum()  # I
        basis = torch.zeros(rank, keys.shape[1], dtype=keys.dtype, device=keys.device)
        basis[torch.arange(rank), score.topk(rank).indices] = 1
    else:
        raise EditError(f"unknown key method {method!r}; expected zca, mean, svd or gandissect")
    if not all_finite(basis):
        raise EditError("the context's directions are not finite: expected a second moment with some energy")
    return basis.float().contiguous()


def protected_subspace(
    moment: SecondMoment, examples: Sequence[tuple[Tensor, Tensor]], *, rank: int, shrinkage: float = 0.0
) -> tuple[Tensor, float]:
    """The dominant subspace of protected keys, whitened: U, m x I float64 orthonormal rows, and the part it leaves out.

    Directions D whose rows are orthogonal to U before they are whitened a second time answer with zero to every key k
    with Z k in the span of U: there W0 + Lambda D acts as W0 does. m is `rank`, or the number of dimensions that the
    keys have. The part: of the whitened keys' squared length, weighted by the masks. The idea is that of AlphaEdit
    (Fang et al., ICLR 2025), there for linear layers of language models.

    examples: as in `context_directions`. EditError for keys that are not finite, or empty masks.
    """
    keys, weights = masked_keys(examples)  # N x I, N
    if len(keys) == 0:
        raise EditError("the protected masks are empty on the key map: expected painted pixels")
    if not all_finite(keys):
        raise EditError("the keys under the protected masks are not finite (NaN or infinity in the activations)")
    whitened = weights[:, None] * (keys @ moment.whitener(shrinkage).to(keys.device))  # N x I
    _, lengths, rows = torch.linalg.svd(whitened, full_matrices=False)
    energy = lengths.square()
    m = min(rank, int((lengths > 1e-9 * lengths[0]).sum()))
    return rows[:m].contiguous(), float(energy[m:].sum() / energy.sum()) if m else 0.0


def _top_singular(rows: Tensor, rank: int) -> Tensor:
    """The top `rank` right singular vectors of rows (N x I): rank x I."""
    if rows.shape[0] > 4 * rows.shape[1]:  # the Gram matrix is much smaller than a tall SVD, and float64 leaves room
        return torch.linalg.eigh(rows.t() @ rows).eigenvectors.flip(1)[:, :rank].t().contiguous()
    return torch.linalg.svd(rows, full_matrices=False).Vh[:rank].contiguous()


def unusual_units(moment: SecondMoment, examples: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """The `count` units whose k^2 / E[k^2], averaged over the context by the masks' weights, is largest.

    Returns their indices and their scores; a score near or below 1 says that the unit is not more active in the
    context than anywhere else. E[k^2] is the diagonal of C. Units that are always zero score zero.
    """
    keys, weights = masked_keys(examples)  # N x I, N
    if len(keys) == 0:
        raise EditError("the context's masks are empty on the key map: expected painted pixels")
    count = min(count, keys.shape[1])
    mean_square = moment.matrix.diagonal().to(keys)  # I
    energy = (weights[:, None] * keys.square()).sum(0) / weights.sum()  # I
    score = torch.where(mean_square > 0, energy / mean_square, torch.zeros_like(energy))
    top = score.topk(count)
    return top.indices, top.values


def joined_directions(directions: list[Tensor]) -> Tensor:
    """Directions of several edits -> an orthonormal basis of their span, r x I."""
    if len(directions) == 1:
        return directions[0]
    stacked = torch.cat(directions).double()  # sum of ranks x I
    _, s, v = torch.linalg.svd(stacked, full_matrices=False)
    return v[s > 1e-6 * s[0]].float().contiguous()
