from __future__ import annotations

import numpy as np
import pytest
import torch

from pyrewrite.errors import NonFiniteError
from pyrewrite.statistics import UnitQuantiles


def samples(d: int, n: int, seed: int = 0) -> torch.Tensor:
    """n x d, another distribution for every unit."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x * torch.arange(1, d + 1) + torch.arange(d) ** 2


def true_ranks(x: torch.Tensor) -> torch.Tensor:
    """(rank + 0.5) / n of every sample among its unit's samples, n x d, for distinct samples."""
    return (x.argsort(0).argsort(0).double() + 0.5) / len(x)


def test_exact_while_few():
    x = samples(3, 1000)
    sketch = UnitQuantiles(3).add(x[:1]).add(x[1:700]).add(x[700:])
    assert sketch.rank_error == 0
    assert torch.equal(sketch.rank(x), true_ranks(x))
    expected = np.quantile(x.double().numpy(), [0.01, 0.5, 0.999], axis=0, method="hazen").T
    assert np.allclose(sketch.quantile([0.01, 0.5, 0.999]), expected, rtol=1e-12)
    assert torch.equal(sketch.quantile(0.5), sketch.quantile([0.5])[:, 0])


def test_ranks_are_strictly_between_0_and_1():
    sketch = UnitQuantiles(1).add(torch.tensor([[1.0], [2.0]]))
    assert sketch.rank(torch.tensor([[-9.0], [1.0], [1.5], [2.0], [9.0]]))[:, 0].tolist() == [
        0.25,
        0.25,
        0.5,
        0.75,
        0.75,
    ]
    large = UnitQuantiles(2).add(samples(2, 100_000))
    ranks = large.rank(torch.tensor([[1e30, 1e30], [-1e30, -1e30]]))
    assert torch.equal(ranks[0], torch.full((2,), 1 - 0.5 / 100_000, dtype=torch.float64))
    assert torch.isfinite(-torch.log(1 - ranks)).all()


def test_equal_samples_share_the_middle():
    sketch = UnitQuantiles(1).add(torch.tensor([[0.0], [0.0], [0.0], [5.0]]))
    assert sketch.rank(torch.tensor([[0.0], [5.0]]))[:, 0].tolist() == [0.375, 0.875]
    constant = UnitQuantiles(1, resolution=4).add(torch.zeros(101, 1))
    assert constant.rank(torch.zeros(1, 1)).item() == 0.5
    assert constant.quantile([0.0, 0.3, 1.0]).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
@pytest.mark.parametrize("resolution", [16, 256])
def test_error_stays_within_the_bound(order, resolution):
    n = 20_011
    x = samples(4, n)
    if order != "random":
        x = x.sort(0, descending=order == "descending").values
    sketch = UnitQuantiles(4, resolution=resolution)
    for part in x.split(777):
        sketch.add(part)
    bound = sketch.rank_error
    assert 0 < bound < 0.55 * (np.log2(n / resolution) + 1) / resolution
    assert (sketch.rank(x) - true_ranks(x)).abs().max() <= bound + 1 / n
    assert sum(level.shape[1] for level in sketch._levels) < resolution * (np.log2(n / resolution) + 2)
    assert torch.equal(sketch.quantile([0.0, 1.0]), torch.stack([x.amin(0), x.amax(0)], 1).double())
    assert (sketch.quantile([0.1, 0.2, 0.9]).diff(dim=1) > 0).all()


def test_quantile_inverts_rank():
    x = samples(3, 5000)
    sketch = UnitQuantiles(3, resolution=64).add(x)
    q = torch.linspace(0.02, 0.98, 25)
    back = torch.stack([sketch.rank(v[None])[0] for v in sketch.quantile(q).T.float()], 1)
    assert (back - q).abs().max() < 2 / 64


def test_the_way_samples_are_cut_makes_no_difference():
    x = samples(3, 3000)
    whole = UnitQuantiles(3, resolution=32).add(x)
    parts = UnitQuantiles(3, resolution=32)
    for part in x.split([1, 0, 31, 900, 68, 2000]):
        parts.add(part)
    maps = UnitQuantiles(3, resolution=32).add(x.reshape(3, 1000, 3).reshape(3, 40, 25, 3).permute(0, 3, 1, 2))
    for other in (parts, maps):
        assert torch.equal(whole.rank(x), other.rank(x))
        assert whole.rank_error == other.rank_error


@pytest.mark.parametrize(
    "x",
    [
        samples(5, 1),
        samples(5, 30).half(),
        samples(5, 30).bfloat16(),
        samples(5, 30).double(),
        samples(30, 5).T,
        samples(5, 48).reshape(2, 24, 5)[:, ::3].permute(0, 2, 1).reshape(2, 5, 4, 2),
        samples(5, 48).reshape(2, 6, 4, 5).permute(0, 3, 1, 2),
    ],
    ids=["one", "fp16", "bf16", "fp64", "transposed", "sliced", "channels_last"],
)
def test_layouts_and_types(x):
    sketch = UnitQuantiles(5).add(x)
    rows = x.float().transpose(0, 1).reshape(5, -1).T
    assert sketch.count == len(rows)
    assert sketch.rank(x).shape == x.shape
    assert torch.allclose(sketch.quantile(0.5), rows.double().quantile(0.5, dim=0))


def test_merge():
    a, b = samples(3, 1500), samples(3, 2600, seed=1) + 2
    left, right = UnitQuantiles(3, resolution=64).add(a), UnitQuantiles(3, resolution=64).add(b)
    right_ranks = right.rank(b)
    left.merge(right).merge(UnitQuantiles(3, resolution=64))
    x = torch.cat([a, b])
    assert left.count == 4100
    assert (left.rank(x) - true_ranks(x)).abs().max() <= left.rank_error + 1 / 4100
    assert torch.equal(right.rank(b), right_ranks)
    assert torch.equal(left.quantile(1.0), x.amax(0).double())
    left.merge(left)
    assert left.count == 8200
    assert (left.rank(x) - true_ranks(x)).abs().max() <= left.rank_error + 1 / 4100
    for other in (UnitQuantiles(4, resolution=64), UnitQuantiles(3, resolution=32)):
        with pytest.raises(ValueError, match="cannot merge"):
            left.merge(other)


def test_arrays_round_trip():
    x = samples(3, 1500)
    sketch = UnitQuantiles(3, resolution=64).add(x[:1400])
    copy = UnitQuantiles.from_arrays(sketch.arrays())
    for each in (sketch, copy):
        each.add(x[1400:])
    assert torch.equal(copy.rank(x), sketch.rank(x))
    assert copy.rank_error == sketch.rank_error
    arrays = sketch.arrays()
    for name, value in (
        ("quantile_count", np.int64(3)),
        ("quantile_values", arrays["quantile_values"][:, 1:]),
        ("quantile_values", arrays["quantile_values"] * np.nan),
        ("quantile_extremes", np.zeros((2, 2), np.float32)),
        ("quantile_compactions", np.zeros((1, 2), np.int64)),
    ):
        with pytest.raises(ValueError, match="contradict"):
            UnitQuantiles.from_arrays({**arrays, name: value})


def test_refused():
    sketch = UnitQuantiles(3)
    for use in (lambda: sketch.rank(torch.zeros(1, 3)), lambda: sketch.quantile(0.5)):
        with pytest.raises(ValueError, match="count is 0"):
            use()
    sketch.add(torch.empty(0, 3)).add(torch.ones(4, 3))
    for shape in ((3,), (4, 2), (2, 4, 3)):
        with pytest.raises(ValueError, match="B x 3"):
            sketch.add(torch.zeros(shape))
    with pytest.raises(ValueError, match="int64"):
        sketch.add(torch.zeros(4, 3, dtype=torch.int64))
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(NonFiniteError):
            sketch.add(torch.tensor([[0.0, value, 0.0]]))
    with pytest.raises(NonFiniteError):
        sketch.rank(torch.full((1, 3), float("nan")))
    for q in (-0.1, 1.1, float("nan"), [[0.5]]):
        with pytest.raises(ValueError, match="between 0 and 1"):
            sketch.quantile(q)
    assert sketch.count == 4
    for resolution in (0, 3, 2.0):
        with pytest.raises(ValueError, match="resolution"):
            UnitQuantiles(3, resolution=resolution)
    with pytest.raises(ValueError, match="number of units"):
        UnitQuantiles(0)
