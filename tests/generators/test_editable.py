"""Any torch module: its layers as they are seen, edits in place, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families_reference import TutorialGenerator
from support import mask_url
from torch import nn

import pyrewrite as pr
from pyrewrite.errors import UnknownLayerError
from pyrewrite.statistics.collect import key_pixels


class Classifier(nn.Module):
    """A small image classifier: convolutions with and without stride, batch norm, a head of two linear layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 5, padding="same", bias=False), nn.ReLU(),
            nn.Conv2d(10, 9, 1), nn.ReLU(),
        )  # fmt: skip
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Linear(9, 7), nn.LeakyReLU(0.2), nn.Linear(7, 5))

    def forward(self, x):
        return self.head(self.pool(self.features(x)).flatten(1))


class Transformer(nn.Module):
    """Two blocks of attention and an MLP over T tokens."""

    def __init__(self, d=12):
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "out": nn.Linear(d, d), "norm": nn.LayerNorm(d)})
            block["mlp"] = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
            self.blocks.append(block)

    def forward(self, x):  # B x T x d
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm"](x)).chunk(3, -1)
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v))
            x = x + block["mlp"](x)
        return x


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier().eval(), torch.randn(12, 3, 16, 16)


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return Transformer().eval(), torch.randn(12, 9, 12)


@pytest.fixture
def stack():
    """A decoder with up-sampling of each form that can be edited."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.ConvTranspose2d(5, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.ConvTranspose2d(6, 4, 2, 2, bias=False), nn.Tanh(),
        nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1), nn.Conv2d(4, 3, 3, padding=0),
    )  # fmt: skip
    return module.eval(), torch.randn(10, 5, 3, 3)


def edit(layer, size=16):
    url = mask_url(size, 4, 4, 12, 14)
    context = [pr.Selection(n, url) for n in (2, 3, 4)]
    return pr.Edit(object=pr.Selection(0, url), paste=pr.Selection(1, url), context=context, layer=layer)


def test_layers_of_a_classifier(classifier):
    module, sample = classifier
    g = pr.as_editable(module, sample)
    assert list(g.layers) == ["features.0", "features.5", "features.7", "head.0", "head.2"]
    assert "features.2 (Conv2d) cannot be edited: its stride is (2, 2), expected 1" in g.notes
    layer = g.layers["features.5"]
    assert (layer.in_channels, layer.out_channels, layer.kernel_size, layer.resolution) == (12, 10, 5, 8)
    assert layer.weight.data_ptr() == module.features[5].weight.data_ptr()
    assert torch.equal(g(sample), module(sample))
    assert torch.equal(g.images([3, 1]), module(sample[[3, 1]]))


@pytest.mark.parametrize("which", ["classifier", "transformer", "stack"])
def test_keys_values_and_what_follows(which, request):
    module, sample = request.getfixturevalue(which)
    g = pr.as_editable(module, sample)
    z = g.latents([2, 5, 7])
    assert torch.equal(z, sample[[2, 5, 7]])
    with torch.no_grad():
        truth = module(z)
        for name, layer in g.layers.items():
            seen = []
            with_hook = dict(module.named_modules())[name].register_forward_hook(
                lambda m, args, out, seen=seen: seen.append((args[0], out))
            )
            module(z)
            with_hook.remove()
            captured = g.capture(name, z)
            key, value = (t if t.ndim == 4 else t.reshape(3, -1, t.shape[-1]).transpose(1, 2) for t in seen[0])
            assert torch.equal(captured.key.flatten(2), key.flatten(2))
            assert torch.equal(captured.value.flatten(2), value.flatten(2))
            assert torch.equal(g.keys(name, z), captured.key)
            assert captured.key.shape[2] * captured.key.shape[3] == key_pixels(layer)
            torch.testing.assert_close(g.value(name, captured), captured.value, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(g.finish(name, captured), truth)
            assert not torch.allclose(g.finish(name, captured, captured.value + 1), truth)
            with pytest.raises(ValueError, match="got"):
                g.finish(name, captured, captured.value[:, :1])
            assert g.mean_style(name) is None
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_keys_run_nothing_after_the_layer(classifier):
    module, sample = classifier
    g = pr.as_editable(module, sample)
    module.head[0].register_forward_hook(lambda *_: pytest.fail("the head ran"))
    g.keys("features.5", sample[:2])
    g.capture("features.7", sample[:2])


@pytest.mark.parametrize(
    ("which", "layer"),
    [
        ("classifier", "features.5"), ("classifier", "head.0"), ("transformer", "blocks.1.mlp.2"),
        ("stack", "0"), ("stack", "2"), ("stack", "4"), ("stack", "5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["low_rank", "least_squares"])
@pytest.mark.filterwarnings("ignore::pyrewrite.rewriting.EditWarning")  # random weights: not every edit takes
def test_edits_in_place(which, layer, method, request, tmp_path):
    module, sample = request.getfixturevalue(which)
    original = copy.deepcopy(module)
    g = pr.as_editable(module, sample)
    rewriter = pr.Rewriter(g, layer, samples=len(sample), cache_dir=tmp_path, progress=False)
    assert rewriter.moment.count == len(sample) * key_pixels(g.layers[layer])
    patch = rewriter.solve(edit(layer), rank=2, method=method, steps=61, lr=0.01, preserve=0.0, margin=0)
    assert patch.report.loss_after < patch.report.loss_before
    with torch.no_grad():
        before = module(sample)
        with patch.applied(g):
            assert not torch.equal(module(sample), before)
            changed = {n for n, p in module.named_parameters() if not torch.equal(p, original.get_parameter(n))}
            assert changed == {f"{layer}.weight"}
        for name, parameter in module.named_parameters():  # bit for bit
            assert torch.equal(parameter, original.get_parameter(name)), name
        assert torch.equal(module(sample), before)
    patch.save(tmp_path / "p.safetensors")
    again = pr.LowRankPatch.load(tmp_path / "p.safetensors")
    again.apply_(pr.as_editable(original, sample[:3]))  # the same weights, another sample
    patch.apply_(g)
    with torch.no_grad():
        torch.testing.assert_close(original(sample), module(sample))


def test_the_same_as_the_family_that_is_built_in(tmp_path):
    """The tutorial's DCGAN as a module and as a generator: the same keys, values, statistics and patch."""
    module = TutorialGenerator(z=6, widths=(9, 8, 4))
    torch.save(module.state_dict(), tmp_path / "g.pth")
    generator = pr.load_generator(tmp_path / "g.pth")
    sample = generator.latents(range(20))[:, :, None, None]
    g = pr.as_editable(module.main, sample)
    assert list(g.layers) == ["3", "6", "9"]  # the first one is transposed with stride 1
    assert any("0 (ConvTranspose2d) cannot be edited" in note for note in g.notes)
    for theirs, ours in (("3", "layer2"), ("6", "layer3"), ("9", "layer4")):
        a, b = g.capture(theirs, sample[:3]), generator.capture(ours, sample[:3])
        torch.testing.assert_close(a.key, b.key)
        torch.testing.assert_close(a.value, b.value)
    size = generator.image_size
    patches = [
        pr.Rewriter(x, layer, samples=20, cache_dir=False, progress=False).solve(
            edit(layer, size), rank=2, method="least_squares", preserve=0.0, margin=0
        )
        for x, layer in ((g, "6"), (generator, "layer3"))
    ]
    deltas = [p.updates[0].delta() for p in patches]
    torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-3, atol=1e-4 * float(deltas[1].abs().max()))


def test_values_after_a_following_module(classifier):
    module, sample = classifier
    g = pr.as_editable(module, sample, layers=["features.0", "head.0"], after={"features.0": "features.1"})
    assert list(g.layers) == ["features.0", "head.0"]
    with torch.no_grad():
        captured = g.capture("features.0", sample[:2])
        assert torch.equal(captured.value, module.features[:2](sample[:2]))
        assert g.conv_layer("features.0").negative_slope == pytest.approx(0.1)
        torch.testing.assert_close(g.value("features.0", captured), captured.value)
        torch.testing.assert_close(g.finish("features.0", captured), module(sample[:2]))
    for after, what in (
        ({"features.5": "features.6"}, "a ReLU: only LeakyReLU and Identity"),
        ({"features.0": "features.3"}, "a BatchNorm2d: only LeakyReLU"),
        ({"features.7": "features.1"}, r"'features\.1' runs before it"),
        ({"features.2": "features.1"}, "its stride is"),
        ({"features.0": "nothing"}, "no submodule 'nothing'"),
        ({"nothing": "features.1"}, "no submodule 'nothing'"),
    ):
        with pytest.raises(ValueError, match=what):
            pr.as_editable(module, sample, after=after)


def test_a_copy_is_a_network_of_its_own(stack):
    module, sample = stack
    g = pr.as_editable(module, sample)
    other = copy.deepcopy(g)
    with torch.no_grad():
        for layer in other.layers.values():
            layer.weight.zero_()
        assert all(p.abs().sum() > 0 for p in module.parameters())
        assert not any(other.module[n].weight.any() for n in (0, 2, 4, 5))
    assert g.weights_hash() != other.weights_hash()


def test_statistics_belong_to_the_sample(classifier, tmp_path):
    module, sample = classifier
    for batch, cached in ((sample, False), (sample, True), (sample + 1, False), (sample[:8], False)):
        g = pr.as_editable(module, batch)
        found = pr.collect(g, "features.5", samples=8, cache_dir=tmp_path, progress=False)
        assert found.from_cache is cached
    with pytest.raises(ValueError, match=r"input 8 is not in the sample, which has 8"):
        pr.collect(g, "features.5", samples=9, cache_dir=False)
    with pytest.raises(ValueError, match="input 11 is not in the sample"):
        g.latents([0, 11])
    assert pr.as_editable(module, sample).weights_hash() == g.weights_hash()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_layers_that_cannot_be_edited(classifier):
    _, sample = classifier
    for part, what in (
        (nn.Conv2d(3, 3, 3, groups=3, padding=1), "groups are 3"),
        (nn.Conv2d(3, 3, 3, dilation=2, padding=2), "dilation"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), "'circular', expected zeros"),
        (nn.Conv2d(3, 3, (3, 1), padding=(1, 0)), "expected a square"),
        (nn.Conv2d(3, 3, 3, padding=(1, 0)), "the same on all sides"),
        (nn.Conv2d(3, 3, 3, padding=4), "expected less"),
        (nn.Conv2d(3, 3, 4, padding="same"), "padding is same"),
        (nn.Conv2d(3, 3, 3, stride=2), "stride"),
        (nn.ConvTranspose2d(3, 3, 4, 1, 1), "expected stride 2"),
        (nn.ConvTranspose2d(3, 3, 5, 2, 1), "twice the size"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), "computed from other parameters"),
    ):
        with pytest.raises(ValueError, match=rf"no layer that can be edited: 0 \(.*{what}"):
            pr.as_editable(nn.Sequential(part).eval(), sample)
        with pytest.raises(ValueError, match=f"layer '0' cannot be edited: .*{what}"):
            pr.as_editable(nn.Sequential(part).eval(), sample, layers=["0"])
    shared = nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(ValueError, match="it runs 2 times"):
        pr.as_editable(nn.Sequential(shared, nn.ReLU(), shared).eval(), sample)
    hooked = nn.Sequential(nn.Conv2d(3, 3, 3))
    hooked[0].register_forward_hook(lambda part, args, out: out * 2)
    with pytest.raises(ValueError, match="not the convolution of what goes in"):
        pr.as_editable(hooked.eval(), sample)


def test_arguments(classifier):
    module, sample = classifier
    with pytest.raises(TypeError, match="expected a torch module, got str"):
        pr.as_editable("module", sample)
    with pytest.raises(TypeError, match="a tensor, got list"):
        pr.as_editable(module, [sample])
    with pytest.raises(ValueError, match="at least one input"):
        pr.as_editable(module, sample[:0])
    with pytest.raises(ValueError, match=r"training mode.*eval"):
        pr.as_editable(copy.deepcopy(module).train(), sample)
    with pytest.raises(ValueError, match="no submodule 'x'; it has features"):
        pr.as_editable(module, sample, layers=["x"])
    with pytest.raises(ValueError, match="'pool' is a AdaptiveAvgPool2d that does not run or has no weight"):
        pr.as_editable(module, sample, layers=["pool"])
    with pytest.raises(ValueError, match="it has no parameters"):
        pr.as_editable(nn.Sequential(nn.ReLU()).eval(), sample)
    g = pr.as_editable(module, sample)
    with pytest.raises(UnknownLayerError, match=r"there is no layer 'features\.2'"):
        g.keys("features.2", sample)
    with pytest.raises(ValueError, match="truncation"):
        g.truncation = 0.5
