"""The Rewriter end to end: edits take, the generator is left as it was, and what cannot be solved says why."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings

import numpy as np
import pytest
import torch
from support import bits, mask_url, same_bits

from pyrewrite import Edit, EditWarning, Rewriter, Selection
from pyrewrite.errors import EditError, NonFiniteError, UnknownLayerError
from pyrewrite.rewriting import encode_mask
from pyrewrite.rewriting.selection import bounding_box, grow, mask_on_map
from pyrewrite.rewriting.targets import capture

QUICK = {"rank": 3, "steps": 31, "shrinkage": 0.3, "margin": 0}
LAYERS = [
    ("peeps", "layer2"),
    ("peeps", "layer4"),
    ("peeps", "layer5"),  # up-sampling
    ("peeps-progan", "layer1"),  # 1 x 1 keys, 4 x 4 kernel
    ("peeps-progan", "layer4"),
]


def rank_for(layer, rank):
    return 1 if layer == "layer1" else rank


@pytest.mark.parametrize(("name", "layer"), LAYERS)
@pytest.mark.parametrize("method", ["low_rank", "projected", "least_squares"])
@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
def test_solve_leaves_the_generator_and_reports_what_the_patch_does(rewriters, edit, name, layer, method):
    rw = rewriters(name, layer)
    kept = bits(rw.generator)
    record = edit(rw.generator.image_size)
    settings = {**QUICK, "rank": rank_for(layer, 3), "method": method, "lr": 0.01 if method == "projected" else 0.05}
    patch = rw.solve(record, **settings)
    assert same_bits(rw.generator, kept)
    assert rw.generator.patches is None
    # the report against a measurement of its own
    measured = []
    with patch.applied(rw.generator):
        after = capture(rw.generator, layer, [0, 1, 2, 3], 1)
    before = capture(rw.generator, layer, [0, 1, 2, 3], 1)
    size = before.value_size
    area = mask_on_map(record.object.mask, size, (rw.generator.image_size,) * 2)
    rows, columns = (area > 0).any(1).nonzero().flatten(), (area > 0).any(0).nonzero().flatten()
    rows, columns = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    alpha = area[rows, columns]
    for image in (1, 2, 3):
        goal = (1 - alpha) * before.value[image][:, rows, columns] + alpha * before.value[0][:, rows, columns]
        measured.append((after.value[image][:, rows, columns] - goal).abs().mean().item())
    assert patch.report.loss_after == pytest.approx(np.mean(measured), rel=1e-4)
    if method == "low_rank":
        assert patch.report.loss_after < 0.9 * patch.report.loss_before
    with patch.applied(rw.generator):
        assert not same_bits(rw.generator, kept)
    assert same_bits(rw.generator, kept)


def test_pasting_what_is_there_is_no_change(rewriters):
    """The crop has its surroundings: an image's own values, pasted where they are, have no loss at all."""
    rw = rewriters("peeps", "layer4")
    url = mask_url(128, 32, 32, 96, 96)
    record = Edit(object=Selection(5, url), paste=Selection(5, url))
    with pytest.warns(EditWarning):
        ours = rw.solve(record, rank=1, steps=1, warm_start=False)
    assert ours.report.loss_before < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditWarning)
        official = rw.solve(record, "official", steps=1)
    assert (
        float(official.report.loss_shown) > 0.05
    )  # the published crop, convolved alone, sees a loss where there is none


@pytest.mark.parametrize("weighting", ["box", "alpha"])
@pytest.mark.parametrize("targets", ["paste", "context"])
def test_targets_and_weighting(rewriters, edit, weighting, targets):
    rw = rewriters("peeps", "layer4")
    report = rw.solve(edit(128), **QUICK, weighting=weighting, targets=targets).report
    assert [t["image"] for t in report.targets] == ([1] if targets == "paste" else [1, 2, 3])
    assert report.loss_after < report.loss_before


@pytest.mark.parametrize("weighting", ["box", "alpha"])
def test_a_margin_keeps_what_is_around_the_object(rewriters, edit, weighting):
    rw = rewriters("peeps", "layer4")
    record = edit(128)
    images = [s.image for s in record.context]
    before = capture(rw.generator, "layer4", images, 1).value
    box = bounding_box(mask_on_map(record.paste.mask, before.shape[2:], (128, 128)))
    around = torch.zeros(before.shape[2:], dtype=torch.bool)
    around[grow(box, 2, before.shape[2:]).slices()] = True
    around[box.slices()] = False
    changes = {}
    for margin in (0, 2):
        patch = rw.solve(record, **{**QUICK, "steps": 101, "margin": margin}, weighting=weighting)
        with patch.applied(rw.generator):
            after = capture(rw.generator, "layer4", images, 1).value
        changes[margin] = (after - before)[:, :, around].abs().mean().item()
    assert changes[2] < 0.8 * changes[0]
    # the pixels of the margin are part of the goal, as they are
    (target, *_) = rw._targets(capture(rw.generator, "layer4", range(4), 1), record, record.resolve(margin=2))
    assert target.crop == grow(box, 2, before.shape[2:])
    assert record.resolve("official").margin == 0


def test_images_from_kept_activations(rewriters, edit):
    """What runs before the layer once for all: the same images as from the beginning, to rounding."""
    for name, layer in (("peeps", "layer5"), ("peeps", "layer8"), ("peeps-progan", "layer4")):
        rw = rewriters(name, layer)
        record = edit(rw.generator.image_size)
        kept = bits(rw.generator)
        patch = rw.zero(record, rank=2)
        numbers = [3, 0, 11, 5, 6, 7, 8, 9, 10]
        activations = rw.activations(numbers)
        images = rw.rendered(activations, patch)
        assert same_bits(rw.generator, kept)
        with patch.applied(rw.generator):
            assert torch.allclose(images, rw.generator.images(numbers), atol=2e-5)
        by_number, alpha = rw.pasted(record, numbers)
        again, same_alpha = rw.pasted(record, activations)
        assert torch.equal(by_number, again)
        assert torch.equal(alpha, same_alpha)
        assert rw.rendered([], patch).shape == rw.pasted(record, [])[0].shape == (0, 3, *images.shape[2:])
    other = rewriters("peeps", "layer4").zero(edit(128))
    with pytest.raises(ValueError, match="the patch changes layer4; expected one of layer5"):
        rewriters("peeps", "layer5").rendered([], other)


def test_a_warm_start_begins_where_the_closed_form_ends(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    closed = rw.solve(edit(128), **QUICK, method="least_squares").report.loss_after
    losses = {}
    for warm in (False, True):
        settings = {**QUICK, "steps": 1}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditWarning)
            losses[warm] = rw.solve(edit(128), **settings, warm_start=warm).report
    assert losses[True].loss_shown == pytest.approx(closed, rel=1e-3)
    assert losses[False].loss_shown == pytest.approx(losses[False].loss_before, rel=1e-3)


def test_preserve_makes_the_edit_smaller(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    sizes = [
        rw.solve(edit(128), **QUICK, preserve=mu, method="least_squares").report.relative_size for mu in (0.0, 0.3, 3.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_preserve_and_projected_do_not_go_together(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    with pytest.raises(EditError, match="preserve"):
        rw.solve(edit(128), method="projected", preserve=0.5)


@pytest.mark.parametrize("method", ["zca", "mean", "svd", "gandissect"])
@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
def test_key_methods(rewriters, edit, method):
    rw = rewriters("peeps-progan", "layer4")
    patch = rw.solve(edit(64), **{**QUICK, "rank": 1 if method == "mean" else 3}, key_method=method)
    assert torch.isfinite(patch.updates[0].lambda_).all()
    assert patch.settings["key_method"] == method


def test_two_edits_solved_together(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    a, b = edit(128), edit(128)
    url = mask_url(128, 96, 8, 124, 120)
    b.object, b.paste, b.context, b.name = Selection(4, url), Selection(5, url), [Selection(6, url)], "other"
    patch = rw.solve([a, b], **QUICK)
    assert patch.updates[0].rank == 6
    assert patch.name == "test + other"
    assert [t["image"] for t in patch.report.targets] == [1, 2, 3, 5, 6]
    direction = patch.updates[0].direction
    assert torch.allclose(direction @ direction.t(), torch.eye(6), atol=1e-5)


def test_edits_stack_on_an_edited_generator(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    first = rw.solve(edit(128), **QUICK)
    kept = bits(rw.generator)
    with first.applied(rw.generator):
        edited = bits(rw.generator)
        second = rw.solve(edit(128), **QUICK)
        assert same_bits(rw.generator, edited)
        assert second.generator == first.generator  # both name the generator without patches
        assert second.report.loss_before < first.report.loss_before  # it starts from the edited weights
        with second.applied(rw.generator):
            assert len(rw.generator.patches.active) == 2
    assert same_bits(rw.generator, kept)


def test_statistics_follow_the_layers_before_and_only_those(peeps):
    g = copy.deepcopy(peeps)
    rw = Rewriter(g, "layer4", samples=4, cache_dir=False, progress=False)
    early = Rewriter(g, "layer2", samples=4, cache_dir=False, progress=False)
    url = mask_url(128, 32, 32, 96, 96)
    record = Edit(object=Selection(0, url), paste=Selection(1, url))
    here, before = rw.solve(record, **QUICK), early.solve(record, **QUICK)
    first = rw.moment
    with here.applied(g):
        assert rw.moment is first
    with before.applied(g):
        assert not torch.equal(rw.moment.matrix, first.matrix)
    assert torch.equal(rw.moment.matrix, first.matrix)
    g.truncation = 0.5
    assert not torch.equal(rw.moment.matrix, first.matrix)


# -- removal and search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layer"), [("peeps", "layer4"), ("peeps", "layer5"), ("peeps-progan", "layer4")])
@pytest.mark.parametrize("preset", [None, "official"])
@pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning")
def test_erase(rewriters, edit, name, layer, preset):
    rw = rewriters(name, layer)
    kept = bits(rw.generator)
    settings = {"steps": 21, "method": "low_rank", "lr": 0.02}
    patch = rw.erase(edit(rw.generator.image_size), units=8, preset=preset, **settings)
    assert same_bits(rw.generator, kept)
    assert [t["image"] for t in patch.report.targets] == ([2, 3] if preset is None else [1])
    assert patch.settings["units"] == 8
    if preset is None:
        assert patch.report.loss_after < patch.report.loss_before


def test_erase_needs_no_paste_and_official_erase_does(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    record = edit(128)
    record.object = record.paste = None
    assert rw.erase(record, units=4, steps=21).report.loss_after > 0
    with pytest.raises(EditError, match="'paste' is missing"):
        rw.erase(record, preset="official")
    with pytest.raises(EditError, match="units is 0"):
        rw.erase(record, units=0)


def test_zero_silences_the_directions(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    record = edit(128)
    record.object = record.paste = None
    patch = rw.zero(record, rank=4)
    direction = patch.updates[0].direction
    with patch.applied(rw.generator):
        weight = rw.generator.conv_layer("layer4").weight.detach()
        answer = torch.einsum("oiyx,di->odyx", weight, direction)
        assert answer.abs().max() < 1e-4 * weight.abs().max()


def test_search_finds_the_picture_it_was_shown(rewriters):
    rw = rewriters("peeps", "layer6")
    url = mask_url(128, 10, 20, 50, 110)
    found = rw.search(Edit(context=[Selection(2, url)]), k=5)  # image 2 wears a turban
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert len({number for number, _ in found}) == 5
    assert 2 in [number for number, _ in found]


def test_pasted_images_change_under_the_object(rewriters, edit):
    rw = rewriters("peeps", "layer6")
    images, alpha = rw.pasted(edit(128), [7, 8, 9])
    original = rw.generator.images([7, 8, 9])
    change = (images - original).abs().mean((0, 1))
    assert images.shape == (3, 3, 128, 128)
    assert change[alpha > 0.5].mean() > 5 * change[alpha == 0].mean()
    _, elsewhere = rw.pasted(edit(128), [7], mask=mask_url(128, 64, 0, 128, 64))
    assert not torch.equal(alpha, elsewhere)


# -- what cannot be solved ---------------------------------------------------------------------------------------------


def broken(record, **changes):
    for name, value in changes.items():
        setattr(record, name, value)
    return record


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    [
        ({"object": None}, {}, "field 'object' is missing"),
        ({"paste": None, "context": []}, {}, "'paste' and 'key' are both missing"),
        ({"paste": None}, {"targets": "paste"}, "field 'paste' is missing"),
        ({"object": Selection(2_000_000, mask_url(128, 1, 1, 9, 9))}, {}, "image number 2000000 is out of range"),
        ({"object": Selection(0, encode_mask(np.zeros((128, 128))))}, {}, "object mask: the mask is empty"),
        ({"paste": Selection(0, encode_mask(np.zeros((128, 128))))}, {}, "paste mask: the mask is empty"),
        ({"context": [Selection(2, encode_mask(np.zeros((128, 128))))]}, {}, "context mask 0"),
        ({"object": Selection(0, encode_mask(np.ones((128, 64))))}, {}, "object mask: the mask is 64 x 128"),
        ({"paste": Selection(0, "data:image/png;base64,AAAA")}, {}, "paste mask: the data URL does not hold an image"),
        ({"context": [Selection(2, mask_url(128, 0, 0, 16, 16))]}, {"rank": 5}, "rank 5 is more than the"),
        ({"settings": {"truncation": 0.5}}, {}, "painted at 0.5"),
        ({"settings": {"seed": 2}}, {}, "belong to seed 2"),
        ({}, {"samples": 10}, "samples belongs to the Rewriter"),
        ({}, {"preset": "offical"}, "unknown preset"),
        ({}, {"ranks": 3}, "unknown setting 'ranks'"),
    ],
)
def test_unsolvable_edits_name_the_field_and_change_nothing(rewriters, edit, changes, settings, named):
    rw = rewriters("peeps", "layer4")
    kept = bits(rw.generator)
    with pytest.raises(ValueError) as error:
        rw.solve(broken(edit(128), **changes), **{**QUICK, **settings})
    assert named in str(error.value)
    assert same_bits(rw.generator, kept)


def test_no_edits(rewriters):
    with pytest.raises(EditError, match="no edit"):
        rewriters("peeps", "layer4").solve([])


def test_a_layer_that_is_not_there(peeps):
    with pytest.raises(UnknownLayerError, match="layer99"):
        Rewriter(peeps, "layer99", samples=2, cache_dir=False, progress=False)


def test_nan_in_the_activations(peeps, rewriters, edit):
    g = copy.deepcopy(peeps)
    rw = Rewriter(g, "layer4", statistics=rewriters("peeps", "layer4").statistics)
    with torch.no_grad():
        g.layers["layer3"].weight.view(-1)[0] = float("nan")
    rw._keys_hash = rw._hash_of_keys()  # keep the sound statistics: the capture has to notice
    with pytest.raises(NonFiniteError, match="layer4: the activations of image 0"):
        rw.solve(edit(128), **QUICK)


@pytest.mark.parametrize("method", ["low_rank", "projected"])
def test_ctrl_c_in_the_middle(rewriters, edit, method):
    rw = rewriters("peeps", "layer4")
    kept = bits(rw.generator)
    calls = []

    def progress(done, loss):
        if done == 0:
            assert math.isnan(loss)  # nothing but captures yet
            return
        calls.append((done, loss))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rw.solve(edit(128), rank=3, steps=100_000, method=method, progress=progress)
    assert len(calls) == 2
    assert 0 < calls[0][0] < calls[1][0]
    assert same_bits(rw.generator, kept)
    assert rw.generator.patches is None


@pytest.mark.parametrize("end", [None, 0, QUICK["steps"]], ids=["nowhere", "in the captures", "in the report"])
def test_between_batches_of_images_progress_is_called_with_the_generator_as_it_was(rewriters, edit, monkeypatch, end):
    monkeypatch.setattr("pyrewrite.rewriting.rewriter.capture_batch", lambda generator: 2)
    rw = rewriters("peeps", "layer4")
    kept, unmeasured = bits(rw.generator), []

    def progress(done, loss):
        if math.isnan(loss):
            assert same_bits(rw.generator, kept)
            unmeasured.append(done)
            if done == end:
                raise KeyboardInterrupt

    record = edit(128)
    images = len(rw.images_of(record))
    assert images > 2
    with contextlib.nullcontext() if end is None else pytest.raises(KeyboardInterrupt):
        assert rw.solve(record, progress=progress, **QUICK).report.targets
    batches = -(-images // 2)
    complete = [0] * batches + [QUICK["steps"]] * batches
    assert unmeasured == (complete if end is None else complete[: complete.index(end) + 1])
    assert same_bits(rw.generator, kept)


def test_an_edit_that_does_not_take_warns(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    with pytest.warns(EditWarning, match="did not take"):
        patch = rw.solve(edit(128), rank=1, steps=1, lr=1e-9, warm_start=False)
    assert patch.report.warnings
    assert patch.report.context_changed == 0


def test_an_edit_out_of_proportion_warns(rewriters, edit):
    rw = rewriters("peeps", "layer4")
    with pytest.warns(EditWarning) as caught:
        patch = rw.solve(edit(128), rank=3, steps=40, lr=100.0, warm_start=False)
    assert patch.report.relative_size > 1
    assert any("times as large as the layer's weights" in str(w.message) for w in caught)


def test_a_record_of_another_generator_warns(rewriters, edit):
    rw = rewriters("peeps-progan", "layer4")
    record = edit(64)
    record.generator = {"family": "progan", "hash": rw.generator.weights_hash()}
    quick = {"method": "least_squares", "rank": 2}
    here = rw.solve(record, **quick)
    record.generator["hash"] = "0" * 64
    for solve in (
        lambda: rw.solve(record, **quick),
        lambda: rw.solve([edit(64), record], **quick),
        lambda: rw.zero(record),
    ):
        with pytest.warns(EditWarning, match=r"test was made on another generator \(000000000000\.\.\., not "):
            patch = solve()
        assert "its numbers are other pictures here" in patch.report.warnings[0]
    assert not here.report.warnings


def test_stray_pixels_warn(rewriters, edit):
    mask = np.zeros((128, 128))
    mask[32:96, 32:96] = 1
    mask[120, 3] = 1
    record = edit(128)
    record.paste = Selection(1, encode_mask(mask))
    rw = rewriters("peeps", "layer4")
    with pytest.warns(EditWarning, match=r"paste mask has 1 stray regions \(1 pixels\)"):
        patch = rw.solve(record, **QUICK)
    assert patch.report.islands == {"paste mask": [64 * 64, 1]}


def test_values_at_the_bound_of_a_layer_are_reported(peeps, edit):
    """Networks that were trained with 16-bit layers clamp their values; the solvers do not."""
    generator = copy.deepcopy(peeps)
    record, layer = edit(generator.image_size), "layer4"
    rw = Rewriter(generator, layer, samples=24, cache_dir=False, progress=False)
    free = rw.solve(record, **QUICK)
    assert generator.value_bound(layer) is None
    assert free.report.clamped == 0
    values = rw.capture(range(4)).value
    generator._styled(2).clamp = float(values.abs().max()) / 2
    assert generator.value_bound(layer) == pytest.approx(float(values.abs().max()) / 2)
    with pytest.warns(EditWarning, match="of the edited values lie at the bound"):
        patch = Rewriter(generator, layer, samples=24, cache_dir=False, progress=False).solve(record, **QUICK)
    assert 0.001 < patch.report.clamped < 0.5
    generator._styled(2).clamp = 256.0  # NVIDIA's, which trained values do not come near
    quiet = Rewriter(generator, layer, samples=24, cache_dir=False, progress=False).solve(record, **QUICK)
    assert quiet.report.clamped == 0
    assert quiet.report.loss_after == pytest.approx(free.report.loss_after)
