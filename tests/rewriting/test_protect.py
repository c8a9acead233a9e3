"""Protected keys: the edited layer acts on them as the original does, and the report says how far that goes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import mask_url

from pyrewrite import Edit, Selection
from pyrewrite.errors import EditError
from pyrewrite.rewriting import context_directions
from pyrewrite.rewriting.keys import protected_subspace
from pyrewrite.statistics import SecondMoment

QUICK = {"rank": 3, "steps": 31, "margin": 0}


@pytest.fixture
def world():
    """Keys of 24 channels that are far from white, context and protected examples, float64."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    draw = lambda n: (torch.randn(n, 24, generator=generator, dtype=torch.float64) @ mix).t().reshape(24, n, 1)  # noqa: E731
    moment = SecondMoment(24).add(draw(4000)[:, :, 0].t())
    examples = lambda n: [(draw(n), torch.rand(n, 1, generator=generator) + 0.1)]  # noqa: E731
    return moment, examples(40), examples(30)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_what_lies_in_the_subspace_is_left_as_it_was(world, shrinkage):
    """Against an independent float64 reference: (W0 + Lambda D) k = W0 k for every key of the span."""
    moment, context, protected = world
    u, left_out = protected_subspace(moment, protected, rank=6, shrinkage=shrinkage)
    assert u.shape == (6, 24)
    torch.testing.assert_close(u @ u.t(), torch.eye(6, dtype=torch.float64))
    d = context_directions(moment, context, rank=4, shrinkage=shrinkage, protect=u)
    # the reference: Z by numpy's eigendecomposition, keys k = Z^-1 (a mix of the subspace)
    c = moment.matrix
    values, vectors = torch.linalg.eigh(c + shrinkage * c.diagonal().mean() * torch.eye(24, dtype=torch.float64))
    root = vectors * values.sqrt() @ vectors.t()
    keys = root @ u.t() @ torch.randn(6, 50, dtype=torch.float64)  # 24 x 50
    weight = torch.randn(10, 24, dtype=torch.float64)
    lambda_ = torch.randn(10, 4, dtype=torch.float64)
    changed = (weight + lambda_ @ d.double()) @ keys
    scale = (lambda_ @ d.double()).norm() * keys.norm()
    assert (changed - weight @ keys).norm() < 1e-6 * scale  # D is kept in float32
    free = context_directions(moment, context, rank=4, shrinkage=shrinkage)
    assert (lambda_ @ free.double() @ keys).norm() > 1e-3 * scale  # without protection it is another matter
    # the part that is left out, by its definition
    whitened = torch.cat([k[:, :, 0].t() * a for k, a in protected]) @ torch.linalg.inv(root)
    rest = whitened - whitened @ u.t() @ u
    assert left_out == pytest.approx(float(rest.square().sum() / whitened.square().sum()), rel=1e-6)


def test_as_many_dimensions_as_there_are_keys_and_no_more(world):
    moment, context, _ = world
    few = [(torch.randn(24, 3, 1, dtype=torch.float64), torch.ones(3, 1))]
    u, left_out = protected_subspace(moment, few, rank=20)
    assert len(u) == 3
    assert left_out == pytest.approx(0, abs=1e-12)
    with pytest.raises(EditError, match="protected dimensions is more than the context"):
        context_directions(moment, context, rank=22, protect=u)
    with pytest.raises(EditError, match="empty on the key map"):
        protected_subspace(moment, [(few[0][0], torch.zeros(3, 1))], rank=2)
    with pytest.raises(EditError, match="not finite"):
        protected_subspace(moment, [(few[0][0] * float("nan"), torch.ones(3, 1))], rank=2)


@pytest.mark.parametrize("method", ["svd", "mean", "gandissect"])
def test_only_whitened_directions_can_be_kept_off(world, method):
    moment, context, protected = world
    u, _ = protected_subspace(moment, protected, rank=2)
    with pytest.raises(EditError, match="protect works with key method 'zca'"):
        context_directions(moment, context, method=method, protect=u)


@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
@pytest.mark.parametrize("layer", ["layer4", "layer5"])
def test_solve_protects_and_reports(rewriters, edit, layer):
    rw = rewriters("peeps", layer)
    record = edit(128)
    free = rw.solve(record, **QUICK)
    assert free.report.protected is None
    record.protect = [Selection(n, mask_url(128, 32, 32, 96, 96)) for n in (7, 8)]
    kept = rw.solve(record, **QUICK, protect_rank=30)
    told = kept.report.protected
    assert told["dimensions"] == 30
    assert 0 <= told["left_out"] < 1
    # what is told of the change, measured anew; and it is less than without protection
    changes = {}
    for patch in (free, kept):
        before = rw.capture([7, 8])
        with patch.applied(rw.generator):
            after = rw.capture([7, 8])
        side = before.value.shape[2]
        inside = (slice(None), slice(None), slice(side // 4, 3 * side // 4), slice(side // 4, 3 * side // 4))
        moved = (after.value - before.value).abs()[inside].mean() / before.value.abs()[inside].mean()
        changes[patch] = float(moved)
    assert told["change"] == pytest.approx(changes[kept], rel=0.05)  # the mask's edges are soft there
    assert changes[kept] < changes[free]
    # the closed form of a preview has the same directions
    settings = record.resolve(**QUICK, protect_rank=30)
    preview = rw.closed_form(record, rw.capture(rw.images_of(record, settings)), settings)
    torch.testing.assert_close(preview.updates[0].direction, kept.updates[0].direction)
    assert torch.equal(rw.directions(record, settings), kept.updates[0].direction)


@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
def test_erase_zero_and_joint_solves_protect_too(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    record = edit(128)
    record.protect = [Selection(7, mask_url(128, 40, 40, 80, 80))]
    u, _ = rw._protected(rw.capture([7]), record.protect, record.resolve())
    root = torch.linalg.inv(rw.moment.whitener(0.3))
    for patch in (rw.erase(record, 10, **QUICK), rw.zero(record, rank=3), rw.solve([record, edit(128)], **QUICK)):
        d = patch.updates[0].direction.double()
        answer = (d @ root @ u.t()).norm() / (d @ root).norm()
        assert answer < 1e-5 if patch.updates[0].rank == 3 else answer > 1e-5  # the other edit protects nothing


def test_the_record_carries_it(tmp_path):
    url = mask_url(16, 2, 2, 9, 9)
    record = Edit(object=Selection(0, url), paste=Selection(1, url), protect=[Selection(4, url)])
    record.settings = {"protect_rank": 7}
    record.save(tmp_path / "e.json")
    again = Edit.load(tmp_path / "e.json")
    assert again.protect == record.protect
    assert again.resolve().protect_rank == 7
    with pytest.raises(EditError, match="protect_rank"):
        Edit(settings={"protect_rank": 0}).resolve()
    assert dataclasses.replace(record.resolve(), protect_rank=3).protect_rank == 3
