"""Powers of a second moment through its symmetric eigendecomposition, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrewrite._finite import all_finite
from pyrewrite.errors import NonFiniteError

EIGENVALUE_CUT = 1e-10  # of the largest


def matrix_power(matrix: Tensor, exponent: float, *, shrinkage: float = 0.0, name: str = "the matrix") -> Tensor:
    """(C + a mean(eigenvalue) I) ^ exponent of a symmetric positive semidefinite C; a = `shrinkage`.

    matrix: d x d, any float type. Returns d x d float64, exactly symmetric, on the same device.

    Every eigenvalue e becomes e + a mean(e); those below 1e-10 of the largest are then left out, that is, their
    eigenvectors are sent to zero, as in a pseudo-inverse. Raising them to a floor instead would send a direction of
    C^-1 into channels that are almost silent, where an edit does nothing. With a > 0 nothing falls below the cut
    unless a is tiny; the power then grows no larger than (a mean(e)) ^ exponent, which is what tames faint channels.

    NonFiniteError (a ValueError) for NaN or infinity; ValueError for a matrix that is not square or has no positive
    eigenvalue and for a shrinkage below 0.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] < 1:
        raise ValueError(f"{name} must be a square matrix, its shape is {tuple(matrix.shape)}")
    if not (math.isfinite(shrinkage) and shrinkage >= 0):
        raise ValueError(f"shrinkage must be a finite number of at least 0, got {shrinkage!r}")
    if not math.isfinite(exponent):
        raise ValueError(f"the exponent must be finite, got {exponent!r}")
    if not all_finite(matrix):
        raise NonFiniteError(f"{name} holds NaN or infinite values: the keys it was made of did")
    matrix = matrix.to(torch.float64)
    size = matrix.diagonal().abs().max()
    if size == 0:
        raise ValueError(f"{name} is zero: every key was zero, there is no direction in it")
    # Scaled to about 1, so that neither tiny nor huge keys leave float64's range in the decomposition.
    eigenvalues, vectors = torch.linalg.eigh(matrix / size)  # d ascending, d x d columns
    eigenvalues = eigenvalues + shrinkage * eigenvalues.mean()
    if eigenvalues[-1] <= 0:
        raise ValueError(f"{name} has no positive eigenvalue: not a second moment")
    kept = eigenvalues >= EIGENVALUE_CUT * eigenvalues[-1]  # d bool
    powers = torch.where(kept, eigenvalues.clamp_min(0), 1.0).pow(exponent) * kept  # d
    result = (vectors * powers) @ vectors.T * size**exponent  # d x d
    return 0.5 * (result + result.T)
