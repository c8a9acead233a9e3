"""Context directions against their definitions, written out in float64, and the official tool's faults not repeated."""

from __future__ import annotations

import pytest
import torch

from pyrewrite.errors import EditError
from pyrewrite.rewriting import context_directions, unusual_units
from pyrewrite.statistics import SecondMoment, UnitQuantiles

CHANNELS = 12


def keys(count=4000, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=rng)
    return torch.randn(count, CHANNELS, generator=rng) @ mixing


@pytest.fixture
def moment():
    return SecondMoment(CHANNELS).add(keys())


def example(seed=1, size=6, weights=(1.0,), dtype=torch.float32):
    """A key map and an area of as many pixels as weights."""
    key = keys(size * size, seed).t().reshape(CHANNELS, size, size).contiguous().to(dtype)
    area = torch.zeros(size, size)
    area.view(-1)[7 : 7 + len(weights)] = torch.tensor(weights)
    return key, area


def zca_reference(moment, examples, rank, shrinkage=0.0):
    """The definition, in float64: whiten, weigh, SVD, whiten again, orthonormalise, agree with the sum."""
    c = moment.matrix
    values, vectors = torch.linalg.eigh(c)
    values = values + shrinkage * values.mean()
    z = vectors @ torch.diag(values.rsqrt()) @ vectors.t()
    rows = []
    for key, area in examples:
        for y, x in (area > 0).nonzero().tolist():
            rows.append(area[y, x].double() * (z @ key[:, y, x].double()))
    rows = torch.stack(rows)
    top = torch.linalg.svd(rows).Vh[:rank]
    basis = torch.linalg.qr((top @ z).t()).Q
    signs = (basis.t() @ rows.sum(0)).sign()
    return (basis * signs).t()


@pytest.mark.parametrize("rank", [1, 2, 5, 12])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 5.0])
def test_zca(moment, rank, shrinkage):
    examples = [example(1, weights=[1.0, 0.5, 0.25, 1.0, 1.0, 0.1, 1.0]), example(2, weights=[0.7] * 9)]
    found = context_directions(moment, examples, rank=rank, shrinkage=shrinkage)
    expected = zca_reference(moment, examples, rank, shrinkage)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double() @ found.double().t(), torch.eye(rank).double(), atol=1e-6)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_zca_of_many_pixels_is_that_of_few(moment):
    """The Gram path of tall matrices and the SVD path agree."""
    key, _ = example(3, size=12)
    area = torch.ones(12, 12)
    found = context_directions(moment, [(key, area)], rank=4)
    assert torch.allclose(found.double(), zca_reference(moment, [(key, area)], 4), atol=1e-5)


def test_mean_is_c_inverse_of_the_weighted_mean(moment):
    examples = [example(1, weights=[1.0, 0.5])]
    key, area = examples[0]
    mean = (key.double() * area.double()).sum((1, 2)) / area.double().sum()
    expected = torch.linalg.solve(moment.matrix, mean)
    found = context_directions(moment, examples, method="mean")
    assert torch.allclose(found[0].double(), expected / expected.norm(), atol=1e-6)
    with pytest.raises(EditError, match="one direction, rank 2"):
        context_directions(moment, examples, method="mean", rank=2)


def test_svd_of_adjusted_keys(moment):
    examples = [example(1, weights=[1.0, 0.5, 0.3, 1.0])]
    key, area = examples[0]
    inside = area > 0
    rows = (area[inside].double()[:, None] * key[:, inside].t().double()) @ torch.linalg.inv(moment.matrix)
    expected = torch.linalg.svd(rows).Vh[:2]
    found = context_directions(moment, examples, method="svd", rank=2)
    assert torch.allclose((found.double() @ expected.t()).abs(), torch.eye(2).double(), atol=1e-5)
    assert rows.mean(0) @ found[0].double() >= 0


def test_gandissect_takes_the_most_unusual_units_and_never_nan(moment):
    quantiles = UnitQuantiles(CHANNELS).add(keys())
    key, area = example(1, weights=[1.0, 1.0])
    key[3] = keys()[:, 3].max() * 10  # above everything ever seen, also outside the mask
    key[8] = keys()[:, 8].max() * 10
    found = context_directions(moment, [(key, area)], method="gandissect", rank=2, quantiles=quantiles)
    assert torch.isfinite(found).all()
    assert sorted(found.argmax(1).tolist()) == [3, 8]
    assert torch.equal(found.sum(1), torch.ones(2))
    with pytest.raises(EditError, match="quantiles"):
        context_directions(moment, [(key, area)], method="gandissect")


def test_quiet_channels_do_not_attract_the_direction():
    """With a quarter of the channels nearly silent, the direction stays with those that speak."""
    x = keys()
    x[:, 9:] = 0
    key, area = example(1, weights=[1.0] * 5)
    key[9:] = 0
    direction = context_directions(SecondMoment(CHANNELS).add(x), [(key, area)], rank=1)
    assert direction[0, 9:].abs().max() == 0
    assert torch.isfinite(direction).all()


@pytest.mark.parametrize("rank", [4, 13])
def test_rank_above_what_there_is(moment, rank):
    weights = [1.0] * (3 if rank == 4 else 20)
    with pytest.raises(EditError, match=f"rank {rank} is more than the"):
        context_directions(moment, [example(1, weights=weights)], rank=rank)


def test_empty_mask(moment):
    with pytest.raises(EditError, match="0 key pixels"):
        context_directions(moment, [example(1, weights=[0.0])])


def test_nan_in_the_keys(moment):
    key, area = example(1, weights=[1.0])
    key[0, 1, 1] = float("nan")
    with pytest.raises(EditError, match="not finite"):
        context_directions(moment, [(key, area)])


def test_unknown_method(moment):
    with pytest.raises(EditError, match="'pca'"):
        context_directions(moment, [example()], method="pca")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts(moment, dtype):
    key, area = example(1, weights=[1.0] * 6, dtype=dtype)
    wide = torch.empty(CHANNELS, 6, 12, dtype=dtype)[:, :, ::2].copy_(key)
    a = context_directions(moment, [(key, area)], rank=2)
    b = context_directions(moment, [(wide, area)], rank=2)
    c = context_directions(moment, [(key.permute(0, 2, 1), area.t())], rank=2)
    assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(a, c, atol=1e-5)


def test_unusual_units(moment):
    key, area = example(1, weights=[1.0, 0.5])
    key = key / 100
    key[5] = 1000.0
    key[2] = 500.0
    units, scores = unusual_units(moment, [(key, area)], 2)
    mean_square = keys().double().square().mean(0)
    assert set(units.tolist()) == {2, 5}
    by_unit = dict(zip(units.tolist(), scores.tolist(), strict=True))
    assert by_unit[5] == pytest.approx(1e6 / float(mean_square[5]), rel=1e-6)
    assert by_unit[2] == pytest.approx(25e4 / float(mean_square[2]), rel=1e-6)
