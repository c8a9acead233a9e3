"""insert_projected against the published loop written out: autograd, torch's Adam, projection every few steps."""

from __future__ import annotations

import pytest
import torch
from insertion_support import case, cast, full_weight

from pyrewrite.ops import insert_projected
from pyrewrite.ops.insertion import target_loss


def published(layer, direction, targets, steps, every, lr=0.05):
    weight = layer.weight.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=lr)
    losses = []
    for step in range(steps):
        loss = sum(target_loss(layer, target, weight) for target in targets) / len(targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == steps - 1:
            with torch.no_grad():
                change = torch.einsum("oihw,ri,rj->ojhw", weight - layer.weight, direction, direction)
                weight.copy_(layer.weight + change)
    weight = weight.detach()
    final = sum(target_loss(layer, target, weight).item() for target in targets) / len(targets)
    return weight, torch.tensor(losses, dtype=torch.float64), final


@pytest.mark.parametrize("variant", [
    {},
    {"demodulate": True},
    {"demodulate": True, "taps": 4},
    {"activate": False, "kernel": (1, 1), "rank": 1},
    {"o": 1, "i": 1, "rank": 1, "sizes": ((1, 1),)},
    {"o": 19, "i": 7, "kernel": (2, 3), "demodulate": True, "sizes": ((7, 9), (1, 3))},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("steps", "every"), [(25, 10), (21, 10), (5, 1), (1, 10), (7, 100)])
def test_it_follows_the_published_loop(variant, steps, every):
    layer, direction, targets = case(**variant)
    weight, losses, final = published(layer, direction, targets, steps, every)
    result = insert_projected(layer, direction, targets, steps=steps, project_every=every)
    assert torch.allclose(result.losses, losses, atol=1e-9)
    # Entries whose gradient is rounding move by a part of lr.
    assert torch.allclose(full_weight(layer, direction, result.lambda_), weight, atol=1e-5)
    assert result.final_loss == pytest.approx(final, abs=1e-7)

    single = cast(layer, direction, targets)
    for impl in ("cpu", "torch"):
        result = insert_projected(*single, steps=steps, project_every=every, impl=impl)
        assert torch.allclose(result.losses, losses, atol=2e-3)
        assert result.final_loss == pytest.approx(final, abs=5e-3)


def test_many_steps_keep_the_loss_curve():
    layer, direction, targets = case(o=24, i=16, rank=1, sizes=((8, 9),), demodulate=True)
    _, losses, final = published(layer, direction, targets, 301, 10)
    result = insert_projected(*cast(layer, direction, targets), steps=301)
    assert torch.allclose(result.losses, losses, rtol=0.02)
    assert result.final_loss == pytest.approx(final, rel=0.02)


def test_callback_and_interruption():
    layer, direction, targets = cast(*case())
    kept = layer.weight.clone()
    seen = []
    result = insert_projected(layer, direction, targets, steps=23, callback=lambda *told: seen.append(told))
    assert seen[-1] == (23, result.losses[-1].item())

    def interrupt(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        insert_projected(layer, direction, targets, callback=interrupt)
    assert torch.equal(layer.weight, kept)


def test_errors():
    layer, direction, targets = cast(*case())
    for settings, message in [
        ({"steps": 0}, "steps"),
        ({"project_every": 0}, "project_every"),
        ({"lr": -1.0}, "lr"),
        ({"impl": "gpu"}, "impl"),
    ]:
        with pytest.raises(ValueError, match=message):
            insert_projected(layer, direction, targets, **settings)
    with pytest.raises(ValueError, match="orthonormal"):
        insert_projected(layer, 2 * direction, targets)
    with pytest.raises(ValueError, match="targets is empty"):
        insert_projected(layer, direction, [])
