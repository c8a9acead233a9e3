"""The fused 3 x 3 convolutions against float64, beside plain torch in float32."""

import itertools

import pytest
import torch

from pyrewrite import _C
from pyrewrite.ops import (
    conv3x3,
    conv3x3_kernel_takes,
    conv3x3_ref,
    prepare_conv3x3,
    prepare_upconv3x3,
    upconv3x3,
    upconv3x3_ref,
)
from pyrewrite.ops.convolution import CHANNELS

EXTRAS = ("in_scale", "out_scale", "noise", "bias")


def problem(b=2, i=16, o=32, h=6, w=8, upsample=False, extras=EXTRAS, seed=0):
    """x, weight and the keyword arguments, float32."""
    g = torch.Generator().manual_seed(seed)
    size = (h // 2, w // 2) if upsample else (h, w)
    x = torch.randn(b, i, *size, generator=g)
    weight = torch.randn(o, i, 3, 3, generator=g) / (3 * i**0.5)
    made = {
        "in_scale": torch.rand(b, i, generator=g) + 0.5,
        "out_scale": torch.rand(b, o, generator=g) + 0.5,
        "noise": torch.randn(h, w, generator=g),
        "bias": torch.randn(o, generator=g),
    }
    return x, weight, {**{n: made[n] for n in extras}, "negative_slope": 0.2, "upsample": upsample}


def wide(values):
    return {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in values.items()}


def check(x, weight, settings, **more):
    truth = conv3x3_ref(x.double(), weight.double(), **wide(settings))
    found = conv3x3(x, weight, **settings, impl="cpu", **more)
    assert found.shape == truth.shape
    assert found.dtype == torch.float32
    if truth.numel():
        baseline = (conv3x3_ref(x, weight, **settings) - truth).abs().max()
        assert (found - truth).abs().max() <= 2 * baseline + 1e-6
    return found


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize(("h", "w"), [(2, 2), (4, 2), (6, 8), (16, 16), (14, 50)])
@pytest.mark.parametrize(("i", "o"), [(16, 16), (48, 32), (32, 80)])
def test_equals_the_reference(h, w, i, o, upsample):
    check(*problem(i=i, o=o, h=h, w=w, upsample=upsample))


@pytest.mark.parametrize(("b", "h", "w"), [(0, 4, 4), (1, 1, 1), (1, 1, 7), (3, 5, 3), (1, 13, 1)])
def test_sizes_that_are_not_whole_tiles(b, h, w):
    check(*problem(b=b, h=h, w=w))


def test_no_rows():
    x, weight, settings = problem(h=0)
    assert conv3x3(x, weight, **settings).shape == (2, 32, 0, 8)


@pytest.mark.parametrize("extras", [c for n in range(5) for c in itertools.combinations(EXTRAS, n)], ids=str)
def test_any_of_the_extras_may_be_missing(extras):
    check(*problem(extras=extras))


def test_no_activation():
    x, weight, settings = problem()
    found = check(x, weight, {**settings, "negative_slope": 1.0})
    assert (found < 0).any()


def test_any_strides():
    x, weight, settings = problem(b=2, i=16, h=6, w=6)
    expected = conv3x3(x, weight, **settings)
    inputs = [
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.randn(2, 16, 9, 9)[:, :, 1:7, 2:8].copy_(x),
        torch.randn(4, 16, 6, 6)[::2].copy_(x),
    ]
    for given in inputs:
        assert torch.equal(conv3x3(given, weight, **settings), expected)
    turned = weight.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    assert torch.equal(conv3x3(x, turned, **settings), expected)
    expanded = settings | {"in_scale": settings["in_scale"][:1].expand(2, -1)}
    assert torch.equal(conv3x3(x[:1], weight, **{**expanded, "in_scale": expanded["in_scale"][:1],
                                                "out_scale": settings["out_scale"][:1]}),
                       conv3x3(x, weight, **expanded)[:1])  # fmt: skip


def test_bits_do_not_depend_on_the_batch_or_the_threads():
    x, weight, settings = problem(b=5, i=32, o=48, h=10, w=14)
    every = conv3x3(x, weight, **settings)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for n in range(5):
                one = {k: v[n : n + 1] if k.endswith("scale") else v for k, v in settings.items()}
                assert torch.equal(conv3x3(x[n : n + 1], weight, **one), every[n : n + 1])
    finally:
        torch.set_num_threads(threads)


def test_prepared_weights():
    x, weight, settings = problem()
    prepared = prepare_conv3x3(weight)
    assert torch.equal(conv3x3(x, weight, **settings, prepared=prepared), conv3x3(x, weight, **settings))


def test_upsampling_reads_the_small_map():
    x, weight, settings = problem(upsample=True)
    whole = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    assert torch.equal(conv3x3(x, weight, **settings), conv3x3(whole, weight, **{**settings, "upsample": False}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_reaches_its_neighbours_and_nothing_else(value):
    x, weight, settings = problem(b=2, h=8, w=8, extras=())
    good = conv3x3(x, weight, **settings)
    x[1, 3, 4, 4] = value
    found = conv3x3(x, weight, **settings)
    bad = ~torch.isfinite(found)
    assert bad[1, :, 3:6, 3:6].all()
    assert not bad[1, :, [0, 1, 6, 7]].any()  # rows of tiles that do not touch row 4
    assert torch.equal(found[0], good[0])
    assert torch.equal(found[~bad], good[~bad])


def test_the_rule_for_impl_none():
    with pytest.raises(RuntimeError, match=f"8 and 16 channels, expected multiples of {CHANNELS}"):
        _C.conv3x3_cpu([0] * 7, (0, 0, 0, 8, 16), False, 1.0, 1)
    x, weight, settings = problem()
    assert conv3x3_kernel_takes(weight)
    for other in (weight[:15], weight[:, :5], weight.double(), weight[:, :, :1, :1], weight[:0], weight.half()):
        assert not conv3x3_kernel_takes(other)
        assert prepare_conv3x3(other) is None
    odd, w, s = problem(i=5, o=3)
    assert torch.equal(conv3x3(odd, w, **s), conv3x3_ref(odd, w, **s))
    assert conv3x3(x.double(), weight.double(), **wide(settings)).dtype == torch.float64


def test_gradients_come_from_torch():
    x, weight, settings = problem(b=1, h=4, w=4)
    leaves = [t.clone().requires_grad_() for t in (x, weight, settings["in_scale"])]
    conv3x3(leaves[0], leaves[1], **{**settings, "in_scale": leaves[2]}).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)
    with pytest.raises(RuntimeError, match="no gradient"):
        conv3x3(leaves[0], weight, **settings, impl="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 16, 6)}, ValueError, "B x I x H x W"),
        ({"x": torch.zeros(2, 15, 6, 8)}, ValueError, "2 x 15 x 6 x 8 and 32 x 16 x 3 x 3"),
        ({"weight": torch.zeros(32, 16, 3, 1)}, ValueError, "O x I x 3 x 3"),
        ({"noise": torch.zeros(8, 6)}, ValueError, "noise is 8 x 6, expected 6 x 8"),
        ({"bias": torch.zeros(31)}, ValueError, "bias is 31, expected 32"),
        ({"in_scale": torch.zeros(1, 16)}, ValueError, "in_scale is 1 x 16, expected 2 x 16"),
        ({"out_scale": torch.zeros(2, 32, dtype=torch.float64)}, TypeError, "out_scale is torch.float64"),
        ({"weight": torch.zeros(32, 16, 3, 3, dtype=torch.bfloat16)}, TypeError, "weight is torch.bfloat16"),
        ({"prepared": torch.zeros(100)}, ValueError, "prepared is 100 of torch.float32"),
        ({"impl": "gpu"}, ValueError, "impl must be"),
        ({"impl": "cuda"}, RuntimeError, "no CUDA kernel"),
    ],
)
def test_refusals(change, error, message):
    x, weight, settings = problem()
    given = {"x": x, "weight": weight, **settings, **change}
    with pytest.raises(error, match=message):
        conv3x3(**given)


def test_the_kernel_refuses_other_channels():
    x, weight, settings = problem(i=5, o=3)
    with pytest.raises(ValueError, match="multiples of 16, got a weight of 3 x 5 x 3 x 3"):
        conv3x3(x, weight, **settings, impl="cpu")


def test_opcheck():
    x, weight, settings = problem()
    extras = [settings[name] for name in EXTRAS]
    torch.library.opcheck(torch.ops.pyrewrite.conv3x3, (x, weight, None, *extras, 0.2, False))
    torch.library.opcheck(torch.ops.pyrewrite.conv3x3, (x, weight, None, None, None, None, None, 1.0, False))


def test_compiles_whole():
    x, weight, settings = problem()
    with torch.no_grad():
        compiled = torch.compile(lambda x: conv3x3(x, weight, **settings), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), conv3x3(x, weight, **settings))


# -- the up-sampling convolution -------------------------------------------------------------------------------------

BLUR = ([0.25, 0.75, 0.75, 0.25], [0.1, 0.9, 0.5, -0.2])  # no symmetry: a flipped filter would show


def up_problem(b=2, i=16, o=32, h=6, w=8, extras=EXTRAS, seed=0):
    x, weight, settings = problem(b, i, o, 2 * h, 2 * w, upsample=True, extras=extras, seed=seed)
    del settings["upsample"]
    return x, weight, settings


def check_up(x, weight, settings, **more):
    truth = upconv3x3_ref(x.double(), weight.double(), *BLUR, **wide(settings))
    found = upconv3x3(x, weight, *BLUR, **settings, impl="cpu", **more)
    assert found.shape == truth.shape
    if truth.numel():
        baseline = (upconv3x3_ref(x, weight, *BLUR, **settings) - truth).abs().max()
        assert (found - truth).abs().max() <= 2 * baseline + 2e-6
    return found


@pytest.mark.parametrize(
    ("b", "h", "w"), [(2, 4, 4), (1, 1, 1), (3, 1, 5), (2, 7, 6), (1, 16, 16), (1, 3, 40), (0, 3, 3)]
)
@pytest.mark.parametrize(("i", "o"), [(16, 16), (48, 32), (32, 80)])
def test_upsampling_equals_the_reference(b, h, w, i, o):
    check_up(*up_problem(b=b, h=h, w=w, i=i, o=o))


@pytest.mark.parametrize("extras", [c for n in range(5) for c in itertools.combinations(EXTRAS, n)], ids=str)
def test_upsampling_without_some_of_the_extras(extras):
    check_up(*up_problem(extras=extras))


def test_upsampling_of_no_rows():
    x, weight, settings = up_problem(h=0)
    assert upconv3x3(x, weight, *BLUR, **settings).shape == (2, 32, 0, 16)


def test_upsampling_bits_do_not_depend_on_the_batch_strides_or_threads():
    x, weight, settings = up_problem(b=3, h=9, w=7)
    every = upconv3x3(x, weight, *BLUR, **settings)
    assert torch.equal(upconv3x3(x.contiguous(memory_format=torch.channels_last), weight, *BLUR, **settings), every)
    prepared = prepare_upconv3x3(weight)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for n in range(3):
                one = {k: v[n : n + 1] if k.endswith("scale") else v for k, v in settings.items()}
                found = upconv3x3(x[n : n + 1], weight, *BLUR, **one, prepared=prepared)
                assert torch.equal(found, every[n : n + 1])
    finally:
        torch.set_num_threads(threads)


def test_upsampling_of_a_bad_value():
    x, weight, settings = up_problem(b=2, h=8, w=8, extras=())
    good = upconv3x3(x, weight, *BLUR, **settings)
    x[1, 3, 4, 4] = float("nan")
    found = upconv3x3(x, weight, *BLUR, **settings)
    bad = torch.isnan(found)
    assert bad[1, :, 7:12, 7:12].all()
    assert not bad[1, :, [0, 1, 2, 3, 4, 15]].any()
    assert torch.equal(found[0], good[0])
    assert torch.equal(found[~bad], good[~bad])


def test_upsampling_refusals():
    x, weight, settings = up_problem()
    with pytest.raises(ValueError, match="vertical has 3 numbers, expected 4"):
        upconv3x3(x, weight, [1, 2, 1], BLUR[1], **settings)
    with pytest.raises(ValueError, match="noise is 2 x 2, expected 12 x 16"):
        upconv3x3(x, weight, *BLUR, **{**settings, "noise": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="expected what prepare_upconv3x3 gives"):
        upconv3x3(x, weight, *BLUR, **settings, prepared=torch.zeros(3))
    leaf = x.clone().requires_grad_()
    upconv3x3(leaf, weight, *BLUR, **settings).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_upsampling_opcheck():
    x, weight, settings = up_problem()
    arguments = (x, weight, [*BLUR[0], *BLUR[1]], None, *(settings[name] for name in EXTRAS), 0.2)
    torch.library.opcheck(torch.ops.pyrewrite.upconv3x3, arguments)
