from __future__ import annotations

import math

import pytest
import torch

from pyrewrite.errors import NonFiniteError
from pyrewrite.statistics import SecondMoment, matrix_power


def covariance(eigenvalues: list[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    d = len(eigenvalues)
    noise = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    vectors, _ = torch.linalg.qr(noise)
    matrix = vectors @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ vectors.T
    return 0.5 * (matrix + matrix.T), vectors


@pytest.mark.parametrize("scale", [1e-200, 1e-6, 1.0, 1e200])
def test_whitener_makes_the_moment_the_identity(scale):
    matrix, _ = covariance([0.1, 0.5, 1, 2, 30])
    z = matrix_power(matrix * scale, -0.5)
    assert torch.equal(z, z.T)
    assert (z @ (matrix * scale) @ z - torch.eye(5)).abs().max() < 1e-12


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5, 1.0, 2.0])
def test_powers(exponent):
    matrix, vectors = covariance([0.1, 0.5, 1, 2, 30])
    powers = torch.tensor([0.1, 0.5, 1, 2, 30], dtype=torch.float64) ** exponent
    expected = vectors @ torch.diag(powers) @ vectors.T
    assert (matrix_power(matrix, exponent) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_one_channel():
    assert matrix_power(torch.tensor([[4.0]]), -0.5).tolist() == [[0.5]]
    assert matrix_power(torch.tensor([[4.0]]), -0.5, shrinkage=3.0).tolist() == [[0.25]]


def test_float32_is_decomposed_in_float64():
    matrix, _ = covariance([1e-6, 1, 1])
    z = matrix_power(matrix.float(), -1.0)
    assert z.dtype == torch.float64
    assert (z @ matrix.float().double() - torch.eye(3)).abs().max() < 1e-8


def test_silent_channels_are_left_out():
    moment = SecondMoment(6)
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    x[:, [1, 4]] = 0
    z = moment.add(x).whitener()
    assert torch.isfinite(z).all()
    assert z[[1, 4]].abs().max() < 1e-12
    projector = torch.diag(torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64))
    assert (z @ moment.matrix @ z - projector).abs().max() < 1e-9


def share_in(faint: slice, amplitude: float, shrinkage: float) -> float:
    """The part of a C^-1 direction's length that lies in channels of that amplitude beside channels of 1."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    x[:, faint] *= amplitude
    context = x[:10].mean(0) + torch.cat([torch.ones(12), torch.zeros(4)])
    z = SecondMoment(16).add(x).whitener(shrinkage)
    direction = z @ (z @ context)
    return float(direction[faint].norm() / direction.norm())


def test_a_quarter_of_the_channels_nearly_silent():
    faint = slice(12, 16)
    # A million times fainter, 1e-12 of the variance: below the cut, no part of any direction.
    assert share_in(faint, 1e-6, 0.0) < 1e-6
    # A thousand times fainter, 1e-6 of the variance: above the cut, the pure inverse goes there ...
    assert share_in(faint, 1e-3, 0.0) > 0.99
    # ... and a little shrinkage brings it back; it does no harm to channels below the cut.
    assert share_in(faint, 1e-3, 0.3) < 0.01
    assert share_in(faint, 1e-6, 0.3) < 1e-5


@pytest.mark.parametrize("shrinkage", [1e-3, 0.3, 3.0])
def test_shrinkage_adds_to_every_eigenvalue(shrinkage):
    eigenvalues = [0.0, 1e-14, 0.5, 2, 30]
    matrix, vectors = covariance(eigenvalues)
    shrunk = torch.tensor(eigenvalues, dtype=torch.float64) + shrinkage * sum(eigenvalues) / 5
    expected = vectors @ torch.diag(shrunk**-0.5) @ vectors.T
    assert (matrix_power(matrix, -0.5, shrinkage=shrinkage) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_more_channels_than_keys():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment(40).add(x.double())
    z = moment.whitener()
    whitened = z @ moment.matrix @ z
    assert (whitened @ whitened - whitened).abs().max() < 1e-8  # a projector onto the keys' space
    assert math.isclose(whitened.trace(), 5, rel_tol=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    matrix = torch.eye(3)
    matrix[0, 2] = value
    with pytest.raises(NonFiniteError, match="the keys it was made of"):
        matrix_power(matrix, -0.5)


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (torch.zeros(3, 3), {}, "is zero"),
        (torch.zeros(0, 0), {}, "square"),
        (torch.zeros(2, 3), {}, "square"),
        (torch.zeros(3), {}, "square"),
        (-torch.eye(3), {}, "no positive eigenvalue"),
        (torch.eye(3), {"shrinkage": -0.1}, "shrinkage"),
        (torch.eye(3), {"shrinkage": float("nan")}, "shrinkage"),
        (torch.eye(3), {"exponent": float("inf")}, "exponent"),
    ],
)
def test_refused(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        matrix_power(matrix, **{"exponent": -0.5, **options})
