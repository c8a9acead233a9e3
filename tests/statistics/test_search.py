from __future__ import annotations

import pytest
import torch

from pyrewrite.errors import NonFiniteError
from pyrewrite.statistics import match, match_mask, scan_direction, top_images
from pyrewrite.statistics.search import KeptKeys


def all_scores(generator, direction: torch.Tensor, samples: int) -> torch.Tensor:
    """samples x 25 float64: d . k of every pixel."""
    keys = generator.keys("layer2", generator.latents(range(samples))).double()
    return torch.einsum("i,bihw->bhw", direction.double(), keys).flatten(1)


@pytest.fixture
def direction():
    return torch.randn(6, generator=torch.Generator().manual_seed(5))


def test_top_images_are_those_with_the_largest_pixel(tiny, direction):
    best = all_scores(tiny, direction, 50).amax(1)
    expected = best.argsort(descending=True)[:7].tolist()
    found = top_images(tiny, "layer2", direction, samples=50, k=7)
    assert [number for number, _ in found] == expected
    assert torch.allclose(torch.tensor([score for _, score in found]), best[expected].float(), rtol=1e-5)
    again = top_images(tiny, "layer2", direction[None], samples=50, k=7, batch_size=3)
    assert dict(again) == pytest.approx(dict(found))


def test_exclude_and_few_images(tiny, direction):
    found = top_images(tiny, "layer2", direction, samples=50, k=7)
    without = top_images(tiny, "layer2", direction, samples=50, k=5, exclude=[found[0][0], found[3][0]])
    assert without == [f for i, f in enumerate(found) if i not in (0, 3)]
    assert len(top_images(tiny, "layer2", direction, samples=3, k=7)) == 3
    assert top_images(tiny, "layer2", direction, samples=3, k=7, exclude=range(3)) == []


def test_equal_scores_come_by_number(tiny):
    found = top_images(tiny, "layer2", torch.zeros(6), samples=9, k=4)
    assert found == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0)]


def test_threshold_and_mask(tiny, direction):
    scores = all_scores(tiny, direction, 40)
    scan = scan_direction(tiny, "layer2", direction, samples=40)
    threshold = scan.threshold(0.99)
    assert threshold == pytest.approx(scores.flatten().quantile(0.99).item(), rel=0.1)
    keys = tiny.keys("layer2", tiny.latents(range(40)))
    mask = match_mask(keys, direction, threshold)
    assert mask.shape == (40, 5, 5)
    assert mask.sum() == 10  # a hundredth of 1000 pixels
    assert torch.equal(match_mask(keys[3], direction, threshold), mask[3])


def test_match_of_any_layout_and_type(direction):
    keys = torch.randn(2, 12, 7, 3, generator=torch.Generator().manual_seed(0))[:, ::2]
    expected = torch.einsum("i,bihw->bhw", direction.double(), keys.double())
    for x in (keys, keys.contiguous(memory_format=torch.channels_last), keys.double()):
        assert torch.allclose(match(x, direction).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(match(keys.half(), direction).double(), expected, rtol=1e-2, atol=2e-2)
    assert match(keys[:0], direction).shape == (0, 7, 3)


def test_refused(tiny, direction):
    for wrong in (direction[:5], direction.expand(2, 6), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="length 6"):
            top_images(tiny, "layer2", wrong, samples=3)
    with pytest.raises(NonFiniteError, match="direction"):
        top_images(tiny, "layer2", direction * float("nan"), samples=3)
    with pytest.raises(ValueError, match="k must be"):
        top_images(tiny, "layer2", direction, samples=3, k=0)
    with pytest.raises(ValueError, match="samples must be"):
        top_images(tiny, "layer2", direction, samples=0)
    with pytest.raises(ValueError, match="B x I x h x w"):
        match(torch.zeros(6, 2), direction)
    assert tiny.runs == []
    tiny.poison = {2}
    with pytest.raises(NonFiniteError, match="image 2:"):
        top_images(tiny, "layer2", direction, samples=3)


def test_kept_keys_answer_as_a_pass_does(tiny, direction):
    kept = KeptKeys()
    exact = scan_direction(tiny, "layer2", direction, samples=50, batch_size=7, keep=kept.add)
    assert kept.images == 50
    seen = []
    found = kept.scan(direction, lambda done, of: seen.append((done, of)))
    assert torch.allclose(found.scores, exact.scores, rtol=2e-3)
    assert found.quantiles.count == exact.quantiles.count
    assert found.threshold(0.99) == pytest.approx(exact.threshold(0.99), rel=2e-3)
    assert seen[-1] == (50, 50)
    other = scan_direction(tiny, "layer2", direction.flip(0), samples=50)
    assert torch.allclose(kept.scan(direction.flip(0)).scores, other.scores, rtol=2e-3)
    kept.add(0, torch.ones(2, 6, 5, 5))  # a pass that begins again
    assert kept.images == 2
    assert KeptKeys.bytes_of(tiny.layers["layer2"], 50) == 2 * 50 * 6 * 25


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_kept_keys_of_any_size(direction, size):
    keys = size * torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    kept = KeptKeys()
    kept.add(0, keys)
    expected = match(keys, direction).flatten(1).amax(1)
    assert torch.allclose(kept.scan(direction).scores, expected, rtol=2e-3, atol=0)


def test_kept_keys_refuse(direction):
    with pytest.raises(ValueError, match="no keys have been kept"):
        KeptKeys().scan(direction)
    kept = KeptKeys()
    kept.add(0, torch.ones(1, 6, 2, 2))
    with pytest.raises(ValueError, match="direction of length 6"):
        kept.scan(direction[:5])
    with pytest.raises(NonFiniteError):
        kept.scan(direction * torch.nan)
