"""There and back: every layer, every buffer and every picture stay what they were."""

import families_reference as families
import generators_reference as reference
import nvidia_reference as nvidia
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyrewrite.errors import CheckpointError, CheckpointMismatchError, NonFiniteError
from pyrewrite.generators import load_generator, save_generator
from pyrewrite.generators.loading import BUNDLED


def nvidia_pickle(path, **shape):
    state = nvidia.random_state(**shape)
    path.write_bytes(nvidia.dumps({"G_ema": nvidia.network(state, ""), "G": nvidia.network(state, "")}))


def torch_file(make):
    return lambda path: torch.save(make(), path)


FILES = {
    "rosinality": torch_file(lambda: {"g_ema": reference.stylegan2_state(), "latent_avg": torch.randn(5)}),
    "rosinality, odd filter": torch_file(lambda: {"g_ema": reference.stylegan2_state(taps=(1, 4, 6, 4, 2))}),
    "rosinality, grey, half": torch_file(
        lambda: {n: t.half() for n, t in reference.stylegan2_state(image_channels=1, channels=(5, 3)).items()}
    ),
    "official": torch_file(lambda: reference.sequential(reference.stylegan2_state())),
    "NVIDIA": nvidia_pickle,
    "GenForce StyleGAN2": torch_file(lambda: {"generator_smooth": families.genforce_stylegan2_state()}),
    "mmgeneration": torch_file(lambda: {"state_dict": families.mmgeneration_state()}),
    "ProGAN": torch_file(reference.progan_state),
    "GenForce PGGAN": torch_file(families.genforce_pggan_state),
    "TensorFlow": torch_file(families.tensorflow_progan_state),
    "DCGAN": torch_file(lambda: families.TutorialGenerator(bias=True).state_dict()),
}


@pytest.fixture(params=sorted(FILES))
def file(request, tmp_path):
    path = tmp_path / "original.bin"
    FILES[request.param](path)
    return path


def assert_same(found, wanted):
    assert (found.family, found.image_size, found.z_dim) == (wanted.family, wanted.image_size, wanted.z_dim)
    assert list(found.state_dict()) == list(wanted.state_dict())
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert found.weights_hash() == wanted.weights_hash()
    z = wanted.latents([0, 3])
    with torch.no_grad():
        assert torch.equal(found(z), wanted(z))
        for name, layer in wanted.layers.items():
            assert repr(found.layers[name]) == repr(layer)
            for part in ("key", "value"):
                assert torch.equal(getattr(found.capture(name, z), part), getattr(wanted.capture(name, z), part)), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_there_and_back(file, tmp_path, suffix):
    original = load_generator(file)
    converted = load_generator(save_generator(original, tmp_path / f"there{suffix}"))
    assert_same(converted, original)
    other = ".pt" if suffix == ".safetensors" else ".safetensors"
    assert_same(load_generator(save_generator(converted, tmp_path / f"back{other}")), original)


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_bundled_generators(name, tmp_path):
    original = load_generator(name)
    assert_same(load_generator(save_generator(original, tmp_path / "x.safetensors")), original)


def test_what_a_safetensors_file_holds(tmp_path):
    original = load_generator("peeps")
    path = save_generator(original, tmp_path / "x.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pyrewrite-generator",
        "version": "1",
        "family": "stylegan2",
        "hash": original.weights_hash(),
    }
    stored = load_file(path)
    assert set(stored) == set(original.state_dict())
    path.rename(tmp_path / "x.png")  # the content decides
    assert load_generator(tmp_path / "x.png").weights_hash() == original.weights_hash()


def test_rosinality_checkpoints_have_the_names_of_rosinality(tmp_path):
    nvidia_pickle(tmp_path / "x.pkl", channels=(6, 5), z=4, layers=2)
    content = torch.load(save_generator(load_generator(tmp_path / "x.pkl"), tmp_path / "x.pt"), weights_only=True)
    expected = reference.stylegan2_state(channels=(6, 5), z=4, mapping=(5, 5))
    assert set(content) == {"g_ema", "latent_avg"}
    assert {n: t.shape for n, t in content["g_ema"].items()} == {n: t.shape for n, t in expected.items()}
    # The published definition of that code base makes the same pictures of them.
    state = reference.double({**content["g_ema"], "latent_avg": content["latent_avg"]})
    z = torch.randn(2, 4)
    truth = nvidia.images(nvidia_double(channels=(6, 5), z=4), z.double()).clamp(-1, 1)
    torch.testing.assert_close(reference.stylegan2(state, z.double())[0], truth, rtol=0, atol=1e-6)


def nvidia_double(**shape):
    return {name: tensor.double() for name, tensor in nvidia.random_state(**shape, layers=2).items()}


def test_class_labels_need_safetensors(tmp_path):
    nvidia_pickle(tmp_path / "x.pkl", classes=3)
    original = load_generator(tmp_path / "x.pkl")
    converted = load_generator(save_generator(original, tmp_path / "x.safetensors"))
    original.label = converted.label = 2
    assert_same(converted, original)
    with pytest.raises(ValueError, match=r"3 class labels.*\.safetensors"):
        save_generator(original, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_safetensors_of_others(tmp_path):
    """Any file with names that are known, with or without our metadata, whole or refused."""
    state = families.genforce_stylegan2_state()
    save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.pt")
    assert load_generator(tmp_path / "x.safetensors").weights_hash() == load_generator(tmp_path / "x.pt").weights_hash()
    save_file(state, tmp_path / "x.safetensors", {"format": "pyrewrite-generator", "version": "9"})
    with pytest.raises(CheckpointError, match="version '9' of the format, 1 is read"):
        load_generator(tmp_path / "x.safetensors")
    del state["synthesis.layer0.bias"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointMismatchError, match=r"missing \(1\): synthesis\.layer0\.bias"):
        load_generator(tmp_path / "x.safetensors")


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    FILES["DCGAN"](tmp_path / "x.pt")
    generator = load_generator(tmp_path / "x.pt")
    generator.layers["layer2"].weight.data[0, 0, 0, 0] = float("nan")
    for name in ("y.safetensors", "y.pt"):
        with pytest.raises(NonFiniteError, match=r"main\.3\.weight holds NaN"):
            save_generator(generator, tmp_path / name)
        assert not (tmp_path / name).exists()
