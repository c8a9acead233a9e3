"""A family of one's own: the example of docs/generators.md, and what is refused."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import mask_url

import pyrewrite as pr
from pyrewrite.errors import CheckpointMismatchError, NonFiniteWeightsError
from pyrewrite.generators import loading

DOCS = Path(__file__).parent.parent.parent / "docs" / "generators.md"


@pytest.fixture
def example(tmp_path):
    """The file that the docs show, imported; the family is forgotten afterwards."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    file = tmp_path / "decoder_family.py"
    file.write_text(next(block for block in blocks if "register_family" in block))
    spec = importlib.util.spec_from_file_location("decoder_family", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        loading._REGISTERED.clear()


@pytest.fixture
def state():
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g) / 4  # noqa: E731
    state = {"start.weight": rand(6 * 16, 5), "start.bias": rand(6 * 16)}
    for n, (o, i) in enumerate(((5, 6), (3, 5))):
        state[f"convs.{n}.weight"], state[f"convs.{n}.bias"] = rand(o, i, 3, 3), rand(o)
    return state


@pytest.fixture
def path(state, tmp_path):
    torch.save({"g_ema": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def images(state, z):
    x = F.linear(z, state["start.weight"], state["start.bias"]).view(len(z), -1, 4, 4)
    for n in range(2):
        x = F.relu(x).repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.conv2d(x, state[f"convs.{n}.weight"], state[f"convs.{n}.bias"], padding=1)
    return torch.tanh(x)


@pytest.mark.filterwarnings("ignore::pyrewrite.rewriting.EditWarning")  # random weights
def test_the_example_of_the_docs(example, state, path, tmp_path):
    generator = pr.load_generator(path)
    assert (generator.family, generator.layout, generator.image_size) == ("decoder", "registered", 16)
    z = generator.latents([0, 1, 2])
    torch.testing.assert_close(generator(z), images(state, z), rtol=0, atol=1e-5)
    for name in generator.layers:
        captured = generator.capture(name, z)
        torch.testing.assert_close(generator.finish(name, captured), generator(z))
    url = mask_url(16, 4, 4, 12, 12)
    edit = pr.Edit(object=pr.Selection(0, url), paste=pr.Selection(1, url), context=[pr.Selection(2, url)])
    rewriter = pr.Rewriter(generator, "layer1", samples=8, cache_dir=tmp_path, progress=False)
    patch = rewriter.solve(edit, rank=2, method="least_squares", preserve=0.0)
    kept = generator.images([1])
    with patch.applied(generator):
        assert not torch.equal(generator.images([1]), kept)
    assert torch.equal(generator.images([1]), kept)
    for name in ("saved.pt", "saved.safetensors"):
        assert (
            pr.load_generator(pr.save_generator(generator, tmp_path / name)).weights_hash() == generator.weights_hash()
        )
    assert pr.load_generator(path, family="decoder").family == "decoder"
    with pytest.raises(CheckpointMismatchError, match="a decoder with nearest up-sampling, but family='progan'"):
        pr.load_generator(path, family="progan")


def test_faults_of_files(example, state, tmp_path):
    def load(changed):
        torch.save(changed, tmp_path / "x.pt")
        return pr.load_generator(tmp_path / "x.pt")

    with pytest.raises(CheckpointMismatchError, match=r"x\.pt is not a whole decoder.*convs\.1\.bias"):
        load({n: t for n, t in state.items() if n != "convs.1.bias"})
    with pytest.raises(CheckpointMismatchError, match=r"not a whole decoder.*start\.weight"):
        load({n: t for n, t in state.items() if n != "start.weight"})
    with pytest.raises(CheckpointMismatchError, match=r"not a whole decoder.*Unexpected key"):
        load({**state, "more": torch.zeros(1)})
    with pytest.raises(NonFiniteWeightsError):
        load({**state, "start.bias": torch.full((96,), float("nan"))})


def test_other_families_load_as_before(example):
    assert pr.load_generator("peeps").family == "stylegan2"
    assert pr.load_generator("peeps-progan").family == "progan"


def test_a_family_may_know_what_is_refused_otherwise(example, state, tmp_path):
    names = {"progression.0.weight": torch.zeros(1), **state}
    torch.save(names, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError, match="Unexpected key"):  # asked, though the name is a StyleGAN's
        pr.load_generator(tmp_path / "x.pt")


def test_arguments(example, state, path):
    decoder = example.Decoder
    with pytest.raises(ValueError, match="'progan' is a built-in family"):
        pr.register_family("progan", matches=len, load=decoder)
    with pytest.raises(ValueError, match="'decoder' is registered already"):
        pr.register_family("decoder", matches=len, load=decoder)
    with pytest.raises(TypeError, match="matches and load are functions"):
        pr.register_family("other", matches=3, load=decoder)
    with pytest.raises(ValueError, match="family is one of stylegan2, stylegan3, progan, dcgan, decoder or None"):
        pr.load_generator(path, family="other")
    pr.register_family("decoder", matches=len, load=lambda tensors: tensors, replace=True)
    with pytest.raises(TypeError, match="returned a dict of the family None"):
        pr.load_generator(path)
    pr.register_family("another", matches=lambda tensors: 10**6, load=decoder)
    with pytest.raises(
        TypeError, match="a Decoder of the family 'decoder'; expected a Generator of the family 'another'"
    ):
        pr.load_generator(path)
