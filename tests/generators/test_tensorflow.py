"""Pickles of NVIDIA's TensorFlow networks, and their names in other files: the same images, and nothing is run."""

import families_reference
import numpy as np
import nvidia_reference as reference
import pytest
import torch

from pyrewrite.errors import CheckpointError, CheckpointMismatchError
from pyrewrite.generators import load_generator, save_generator


@pytest.fixture
def save(tmp_path):
    def saved(content, protocol=4):
        path = tmp_path / "network.pkl"
        path.write_bytes(reference.dumps(content, protocol))
        return path

    return saved


def networks(state, **settings):
    worse = {name: tensor + 0.5 for name, tensor in state.items()}
    trained, averaged = (reference.tensorflow_network(s, **settings) for s in (worse, state))
    return trained, reference.Network("D", []), averaged


def assert_images(generator, state, z, **options):
    double = {name: tensor.double() for name, tensor in state.items()}
    truth = reference.images(double, z.double(), **options).clamp(-1, 1)
    torch.testing.assert_close(generator(z).double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [{}, {"channels": (5,)}, {"channels": (5, 3), "image_channels": 1}], ids=str)
def test_stylegan2(save, shape, protocol):
    state = reference.random_state(**shape)
    generator = load_generator(save(networks(state, architecture="skip"), protocol))
    assert (generator.family, generator.layout) == ("stylegan2", "TensorFlow")
    assert "taken from 'Gs'; the file also holds 'G'" in generator.notes[0]
    z = torch.randn(3, 7)
    assert_images(generator, state, z)
    generator.truncation = 0.6
    assert_images(generator, state, z, truncation=0.6)


@pytest.mark.parametrize("architecture", ["orig", "resnet"])
def test_other_architectures(save, architecture):
    state = reference.random_state(architecture=architecture, taps=(1, 2, 2, 1))
    generator = load_generator(save(networks(state, architecture=architecture, resample_kernel=[1, 2, 2, 1])))
    assert generator.architecture == architecture
    assert_images(generator, state, torch.randn(3, 7))


def test_another_filter(save):
    state = reference.random_state(taps=(1, 2, 2, 1))
    generator = load_generator(save(networks(state, resample_kernel=[1, 2, 2, 1])))
    assert_images(generator, state, torch.randn(2, 7))


def test_class_labels(save):
    state = reference.random_state(classes=3)
    generator = load_generator(save(networks(state, label_size=3)))
    generator.label = 2
    assert_images(generator, state, torch.randn(2, 7), label=2)


@pytest.mark.parametrize("scope", ["", "Gs/", "G_"])
def test_the_names_in_a_torch_file(tmp_path, scope):
    state = reference.random_state()
    variables = reference.tensorflow_variables(state)
    prefixed = {f"{scope}{n}" if "/" in n or scope != "G_" else n: torch.tensor(v) for n, v in variables.items()}
    torch.save(prefixed, tmp_path / "x.pt")
    generator = load_generator(tmp_path / "x.pt")
    assert_images(generator, state, torch.randn(2, 7))
    assert load_generator(save_generator(generator, tmp_path / "y.pt")).weights_hash() == generator.weights_hash()


def test_progressive_gan(save):
    state = families_reference.tensorflow_progan_state()
    arrays = [(n, np.float32(t) if not t.ndim else t.numpy()) for n, t in state.items()]
    averaged = reference.Network("Gs", arrays)
    path = save((averaged, reference.Network("D", []), averaged), protocol=2)
    old = path.read_bytes().replace(b"cdnnlib.tflib.network\n", b"ctfutil\n")  # where its first code kept the class
    for data in (path.read_bytes(), old):
        path.write_bytes(data)
        generator = load_generator(path)
        assert (generator.family, generator.layout) == ("progan", "TensorFlow")
        z = torch.randn(2, 5, generator=torch.Generator().manual_seed(5))
        double = {name: tensor.double() for name, tensor in state.items()}
        truth = families_reference.tensorflow_progan(double, z.double()).clamp(-1, 1)
        torch.testing.assert_close(generator(z).double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"architecture": "resnet"}, "says that its architecture is 'resnet', but its names are those of 'skip'"),
        ({"architecture": "orig"}, "says that its architecture is 'orig', but its names are those of 'skip'"),
        ({"mapping_lrmul": 0.1}, r"mapping_lrmul is 0\.1: not supported, only 0\.01"),
        ({"nonlinearity": "relu"}, "nonlinearity is 'relu'"),
        ({"resample_kernel": []}, "resample_kernel"),
        ({"resample_kernel": ["x"]}, "resample_kernel"),
    ],
)
def test_other_settings_are_refused_by_name(save, settings, what):
    with pytest.raises(CheckpointMismatchError, match=what):
        load_generator(save(networks(reference.random_state(), **settings)))


def changed(change):
    """A file whose averaged generator's synthesis has other variables."""
    first, second, averaged = networks(reference.random_state())
    part = averaged.components["synthesis"]
    part.variables = change(dict(part.variables))
    return first, second, averaged


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("8x8/Conv1/weight", None, r"missing \(1\): synthesis/8x8/Conv1/weight; expected"),
        ("8x8/Conv0_up/mod_weight", None, r"missing \(1\): synthesis/8x8/Conv0_up/mod_weight"),
        ("8x8/Skip/weight", np.zeros((1, 1, 6, 5), np.float32), r"missing .*synthesis/16x16/Skip/weight"),
        ("ToRGB_lod0/weight", np.zeros((1, 1, 6, 3), np.float32), "that grew with its training"),
        ("8x8/Conv1/weight", np.zeros((3, 3, 9, 5), np.float32), r"synthesis/8x8/Conv1/weight is .*expected"),
        ("8x8/Conv1/weight", np.zeros((3, 9), np.float32), "expected 4 dimensions"),
        ("8x8/Conv1/mod_bias", np.zeros(9, np.float32), r"synthesis/8x8/Conv1/mod_bias is \(9,\), expected \(5,\)"),
        ("more", np.zeros(2, np.float32), r"extra \(1\): synthesis/more"),
        ("noise1", "text", "a variable noise1 that is a str"),
        ("noise1", {}, "a variable noise1 that is a dict"),
    ],
)
def test_faults_are_named(save, name, value, what):
    def change(variables):
        variables.pop(name, None)
        return [*variables.items(), *([] if value is None else [(name, value)])]

    with pytest.raises(CheckpointError, match=what):
        load_generator(save(changed(change)))


def test_labels_that_are_joined_to_the_latent(save, tmp_path):
    """As StyleGAN2 had them first: a table whose rows are joined to z before both are normalised."""
    state = reference.random_state(z=12)
    table = np.random.RandomState(0).standard_normal((4, 5)).astype(np.float32)
    _, second, averaged = networks(state, label_size=4)
    averaged.components["mapping"].variables.append(("LabelConcat/weight", table))
    generator = load_generator(save((averaged, second, averaged)))
    assert (generator.z_dim, generator.classes) == (7, 4)
    z = torch.randn(2, 7)
    for label in (0, 3):
        generator.label = label
        joined = torch.cat([z, torch.from_numpy(table[label]).expand(2, -1)], 1)
        double = {name: tensor.double() for name, tensor in state.items()}
        truth = reference.images(double, joined.double()).clamp(-1, 1)
        torch.testing.assert_close(generator(z).double(), truth, rtol=0, atol=1e-5)
    again = load_generator(save_generator(generator, tmp_path / "x.safetensors"))
    assert again.weights_hash() == generator.weights_hash()


def test_variables_of_another_form(save):
    for variables, what in (
        ([1], "variables are a int"),
        ([("a",)], "variables are a tuple"),
        ([(1, 2)], "variables are a tuple"),
        ({"a": 1}, "variables are a dict"),
    ):
        with pytest.raises(CheckpointError, match=what):
            load_generator(save(changed(lambda _, variables=variables: variables)))
    first, second, averaged = networks(reference.random_state())
    averaged.components["mapping"] = 3
    with pytest.raises(CheckpointError, match="a int within a network"):
        load_generator(save((first, second, averaged)))
    averaged.components["mapping"] = averaged
    with pytest.raises(CheckpointError, match=r"names of 2\d\d characters"):
        load_generator(save((first, second, averaged)))
