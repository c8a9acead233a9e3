"""Patches: in and out without a trace, in any order, from and to files, and refused where they do not belong."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from support import bits, same_bits

from pyrewrite import LowRankPatch, load_generator, overlap, stack
from pyrewrite.errors import PatchError
from pyrewrite.rewriting import LayerUpdate, set_patches


@pytest.fixture(scope="module")
def pristine():
    return load_generator("peeps-progan")


@pytest.fixture
def g(pristine):
    return copy.deepcopy(pristine)


def make(model, layer="layer4", rank=2, seed=0, size=0.1, **kwargs):
    rng = torch.Generator().manual_seed(seed)
    conv = model.layers[layer]
    direction = torch.linalg.qr(torch.randn(conv.in_channels, rank, generator=rng)).Q.t().contiguous()
    lambda_ = size * torch.randn(conv.out_channels, rank, conv.kernel_size, conv.kernel_size, generator=rng)
    return LowRankPatch([LayerUpdate(layer, direction, lambda_)], name=f"patch{seed}", **kwargs)


@pytest.mark.parametrize("rank", [1, 3, 64])
def test_apply_is_w0_plus_lambda_d(g, rank):
    before = g.layers["layer4"].weight.detach().clone()
    patch = make(g, rank=rank).apply_(g)
    update = patch.updates[0]
    expected = before.double() + torch.einsum("ordx,ri->oidx", update.lambda_.double(), update.direction.double())
    assert torch.allclose(g.layers["layer4"].weight.double(), expected, atol=1e-6)
    assert not torch.equal(g.layers["layer4"].weight, before)


def test_stylegan2_weights_are_five_dimensional(tmp_path):
    g = load_generator("peeps")
    kept = bits(g)
    z = g.latents([0])
    with torch.no_grad():
        original = g(z)
        with make(g, "layer5", rank=3, size=1.0).applied(g):
            assert not torch.equal(g(z), original)
        assert torch.equal(g(z), original)
    assert same_bits(g, kept)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_patches_come_off_in_any_order(g, order):
    kept = bits(g)
    patches = [make(g, "layer4", seed=0), make(g, "layer4", rank=5, seed=1, size=1e4), make(g, "layer6", seed=2)]
    for patch in patches:
        patch.apply_(g)
    for i in order:
        patches[i].remove_(g)
    assert same_bits(g, kept)
    assert g.patches is None


def test_original_and_edited_at_the_same_time(g):
    """From two threads, each with its own copy of the generator: neither sees the other's weights."""
    patch = make(g, "layer4", seed=0, size=0.3)
    z = g.latents([3])
    original = g(z)
    with patch.applied(g):
        edited = g(z)
    both = {"original": copy.deepcopy(g), "edited": copy.deepcopy(g)}
    patch.apply_(both["edited"])
    with ThreadPoolExecutor(2) as pool:
        futures = [(name, pool.submit(both[name], z)) for name in ["original", "edited"] * 8]
        for name, future in futures:
            assert torch.equal(future.result(), original if name == "original" else edited)
    assert not torch.equal(original, edited)


def test_what_remains_is_as_if_the_removed_one_had_never_been(g):
    a, b = make(g, seed=0, size=1e3), make(g, seed=1)
    b.apply_(g)
    alone = bits(g)
    b.remove_(g)
    a.apply_(g)
    b.apply_(g)
    a.remove_(g)
    assert same_bits(g, alone)


def test_negative_zero_survives(g):
    weight = g.layers["layer4"].weight
    with torch.no_grad():
        weight.view(-1)[:5] = -0.0
    kept = bits(g)
    make(g).scaled(0).apply_(g)
    assert same_bits(g, kept)


def test_strength(g):
    kept, patch = bits(g), make(g)
    patch.scaled(0).apply_(g)
    assert same_bits(g, kept)
    patch.scaled(0).remove_(g)
    patch.scaled(1).apply_(g)
    with_one = bits(g)
    patch.remove_(g)  # the same change under another object
    patch.apply_(g)
    assert same_bits(g, with_one)
    assert patch.scaled(0.5).scaled(0.5).settings["strength"] == 0.25
    for bad in (float("nan"), float("inf")):
        with pytest.raises(PatchError, match="strength"):
            patch.scaled(bad)


def test_applying_twice_is_refused(g):
    patch = make(g).apply_(g)
    kept = bits(g)
    with pytest.raises(PatchError, match="active already"):
        patch.apply_(g)
    assert same_bits(g, kept)
    patch.remove_(g)
    with pytest.raises(PatchError, match="not active"):
        patch.remove_(g)


def test_applied_restores_after_an_error(g):
    kept = bits(g)
    with pytest.raises(KeyboardInterrupt), make(g).applied(g):
        raise KeyboardInterrupt
    assert same_bits(g, kept)


def test_the_wrong_generator_is_refused(g):
    patch = make(g, generator={"family": "progan", "hash": "0" * 64})
    kept = bits(g)
    with pytest.raises(PatchError, match="made for a progan with weights 000000000000"):
        patch.apply_(g)
    assert same_bits(g, kept)
    patch.apply_(g, force=True).remove_(g)
    right = make(g, generator={"family": "progan", "hash": g.weights_hash()})
    make(g, seed=5).apply_(g)
    right.apply_(g)  # the hash is that of the weights without patches


def test_missing_layer_and_shape(g):
    kept = bits(g)
    update = make(g).updates[0]
    with pytest.raises(PatchError, match="'layer99'"):
        LowRankPatch([LayerUpdate("layer99", update.direction, update.lambda_)]).apply_(g)
    with pytest.raises(PatchError, match="layer1"):
        LowRankPatch([LayerUpdate("layer1", update.direction, update.lambda_)]).apply_(g)
    assert same_bits(g, kept)
    assert g.patches is None


def test_a_weight_changed_from_outside_is_noticed(g):
    patch = make(g).apply_(g)
    with torch.no_grad():
        g.layers["layer4"].weight[0, 0, 0, 0] += 1
    with pytest.raises(PatchError, match="something else changed"):
        patch.remove_(g)


def test_a_copy_of_an_edited_generator_can_be_restored(g):
    kept, patch = bits(g), make(g).apply_(g)
    other = copy.deepcopy(g)
    patch.remove_(other)
    assert same_bits(other, kept)
    assert not same_bits(g, kept)


def test_the_hash_shows_the_edit(g):
    before = g.weights_hash()
    patch = make(g).apply_(g)
    assert g.weights_hash() != before
    patch.remove_(g)
    assert g.weights_hash() == before


def test_save_and_load(g, tmp_path):
    patch = make(g, generator={"family": "progan", "hash": g.weights_hash()}, settings={"rank": 2})
    patch.save(tmp_path / "p.safetensors")
    loaded = LowRankPatch.load(tmp_path / "p.safetensors")
    assert (loaded.digest, loaded.name, loaded.generator, loaded.settings) == (
        patch.digest,
        patch.name,
        patch.generator,
        patch.settings,
    )
    loaded.apply_(g)
    patch.remove_(g)


def test_views_and_shared_memory_are_saved_each_on_its_own(g, tmp_path):
    base = make(g, rank=4).updates[0]
    update = LayerUpdate("layer4", base.direction[::2], base.lambda_[:, ::2])
    LowRankPatch([update, LayerUpdate("layer6", base.direction[::2], base.lambda_[:, ::2])]).save(tmp_path / "p")
    assert torch.equal(LowRankPatch.load(tmp_path / "p").updates[1].lambda_, base.lambda_[:, ::2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(g, value):
    update = make(g).updates[0]
    bad = update.lambda_.clone()
    bad[0, 0, 0, 0] = value
    with pytest.raises(PatchError, match="lambda holds values that are not finite"):
        LayerUpdate("layer4", update.direction, bad)
    with pytest.raises(PatchError, match="direction holds"):
        LayerUpdate("layer4", update.direction * value, update.lambda_)


@pytest.mark.parametrize(
    ("direction", "lambda_", "named"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 1, 3, 3), "expected r x I and O x r x kh x kw"),
        (torch.zeros(3), torch.zeros(4, 1, 3, 3), "expected r x I"),
        (torch.zeros(1, 3).double(), torch.zeros(4, 1, 3, 3), "direction is torch.float64"),
        (torch.zeros(1, 3), torch.zeros(4, 1, 3, 3).half(), "lambda is torch.float16"),
    ],
)
def test_factors_of_wrong_shape_or_type(direction, lambda_, named):
    with pytest.raises(PatchError, match=named.replace("(", r"\(")):
        LayerUpdate("layer4", direction, lambda_)


def test_files_that_are_not_patches(g, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        LowRankPatch.load(tmp_path / "none.safetensors")
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"")
    with pytest.raises(PatchError, match=r"p\.safetensors"):
        LowRankPatch.load(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(PatchError, match="not a patch"):
        LowRankPatch.load(path)
    make(g).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PatchError, match="cut off"):
        LowRankPatch.load(path)
    update = make(g).updates[0]
    metadata = {"format": "pyrewrite-patch", "version": "1", "layers": json.dumps(["layer4", "layer5"])}
    factors = {"layer4.direction": update.direction, "layer4.lambda": update.lambda_}
    safetensors.torch.save_file(factors, path, metadata=metadata)
    with pytest.raises(PatchError, match="factors missing"):
        LowRankPatch.load(path)
    safetensors.torch.save_file(factors, path, metadata={**metadata, "version": "2"})
    with pytest.raises(PatchError, match="version '2'"):
        LowRankPatch.load(path)
    factors["layer4.lambda"] = update.lambda_ * float("nan")
    safetensors.torch.save_file(factors, path, metadata={**metadata, "layers": '["layer4"]'})
    with pytest.raises(PatchError, match="not finite"):
        LowRankPatch.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generator", '["hash"]'),
        ("generator", '{"hash": 3}'),
        ("generator", '{"hash": {}}'),
        ("settings", '"ab"'),
        ("settings", '{"strength": "1"}'),
        ("report", "[1]"),
        ("layers", '"layer4"'),
        ("layers", "[[4]]"),
        ("layers", "[" * 100_000),
    ],
)
def test_metadata_of_strangers(g, tmp_path, name, value):
    update = make(g).updates[0]
    metadata = {"format": "pyrewrite-patch", "version": "1", "layers": '["layer4"]', name: value}
    factors = {"layer4.direction": update.direction, "layer4.lambda": update.lambda_}
    safetensors.torch.save_file(factors, tmp_path / "p.safetensors", metadata=metadata)
    with pytest.raises(PatchError, match=r"p\.safetensors: ") as error:
        LowRankPatch.load(tmp_path / "p.safetensors")
    assert len(str(error.value)) < 500


def test_a_failed_save_leaves_the_old_file(g, tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    make(g).save(path)
    kept = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make(g, seed=1).save(path)
    assert path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_stack_is_the_sum(g):
    a, b, c = make(g, seed=0), make(g, rank=3, seed=1), make(g, "layer6", seed=2)
    for patch in (a, b, c):
        patch.apply_(g)
    summed = {n: t.clone() for n, t in g.state_dict().items()}
    for patch in (a, b, c):
        patch.remove_(g)
    total = stack([a, b, c])
    total.apply_(g)
    assert all(torch.allclose(t, summed[n], atol=1e-6) for n, t in g.state_dict().items())
    assert [u.rank for u in total.updates] == [5, 2]
    assert set(total.overlap) == {"patch0 / patch1", "patch0 / patch2", "patch1 / patch2"}


def test_overlap(g):
    a, b = make(g, seed=0), make(g, seed=1)
    assert overlap(a, a) == pytest.approx(1)
    assert overlap(a, a.scaled(-2)) == pytest.approx(-1)
    assert abs(overlap(a, b)) < 0.1
    assert overlap(a, make(g, "layer6")) == 0
    assert overlap(a, a.scaled(0)) == 0
    with pytest.warns(UserWarning, match="100% of the directions are shared"):
        stack([a, a.scaled(0.5)])


def test_stack_of_different_generators_or_none(g):
    with pytest.raises(PatchError, match="at least one"):
        stack([])
    a = make(g, generator={"family": "progan", "hash": "a" * 64})
    with pytest.raises(PatchError, match="different generators"):
        stack([a, make(g, seed=1, generator={"family": "progan", "hash": "b" * 64})])


def small_patches(generator, count=3, layer="layer4"):
    chance = torch.Generator().manual_seed(5)
    o, i = generator.layers[layer].out_channels, generator.layers[layer].in_channels
    make = lambda *shape: torch.randn(*shape, generator=chance)  # noqa: E731
    return [LowRankPatch([LayerUpdate(layer, make(2, i), 0.01 * make(o, 2, 3, 3))]) for _ in range(count)]


def test_set_patches_makes_weights_a_function_of_the_list(peeps):
    kept = bits(peeps)
    a, b, c = small_patches(peeps)
    set_patches(peeps, [a, b, c])
    sum_of_three = bits(peeps)
    set_patches(peeps, [c])
    set_patches(peeps, [b, a])
    assert not same_bits(peeps, sum_of_three)
    set_patches(peeps, [a, b, c])
    assert same_bits(peeps, sum_of_three)  # whatever was there before
    (other,) = small_patches(peeps, 1, "layer6")
    set_patches(peeps, [other])
    assert torch.equal(peeps.layers["layer4"].weight, kept["convs.1.conv.weight"])
    set_patches(peeps, [])
    assert same_bits(peeps, kept)
    assert peeps.patches is None


def test_set_patches_refuses_and_leaves_all_as_it_was(peeps):
    a, b, _ = small_patches(peeps)
    set_patches(peeps, [a])
    kept = bits(peeps)
    bad = LowRankPatch([LayerUpdate("layer99", a.updates[0].direction, a.updates[0].lambda_)])
    for patches, text in (([a, a], "twice"), ([b, bad], "layer99")):
        with pytest.raises(PatchError, match=text):
            set_patches(peeps, patches)
        assert same_bits(peeps, kept)
        assert peeps.patches.active == [a]
    with torch.no_grad():
        peeps.layers["layer4"].weight.add_(1)
    with pytest.raises(PatchError, match="something else changed them"):
        set_patches(peeps, [])
    with torch.no_grad():
        peeps.layers["layer4"].weight.copy_(peeps.patches.weight("layer4"))
    set_patches(peeps, [])


def test_a_patch_as_bytes(peeps):
    a, _, _ = small_patches(peeps)
    a.name, a.settings = "hat", {"rank": 2}
    again = LowRankPatch.from_bytes(a.to_bytes())
    assert (again.digest, again.name, again.settings) == (a.digest, "hat", {"rank": 2})
    for data in (b"", a.to_bytes()[:-1], b"\xff" * 64):
        with pytest.raises(PatchError, match=r"upload: not a \.safetensors file"):
            LowRankPatch.from_bytes(data, "upload")
