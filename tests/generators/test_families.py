"""Each family's files give the same images as its published definition, whatever the layout calls the weights."""

import copy
import sys
import types
from pathlib import Path

import families_reference as reference
import generators_reference
import numpy as np
import nvidia_reference
import pytest
import torch

from pyrewrite.errors import CheckpointMismatchError, DamagedCheckpointError, NonFiniteWeightsError
from pyrewrite.generators import load_generator, save_generator

TOLERANCE = 1e-5


@pytest.fixture
def save(tmp_path):
    def saved(content, name="generator.pth", **options):
        path = tmp_path / name
        torch.save(content, path, **options)
        return path

    return saved


def double(state):
    return {name: tensor.double() for name, tensor in state.items()}


def latents(z, count=3):
    return torch.randn(count, z, generator=torch.Generator().manual_seed(9))


def assert_images(generator, truth, z):
    with torch.no_grad():
        found, exact = generator(z), copy.deepcopy(generator).double()(z)
    torch.testing.assert_close(found.double(), truth.clamp(-1, 1), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(exact, truth.clamp(-1, 1), rtol=0, atol=2e-6)  # the weights are float32 in both


# -- GenForce ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [{}, {"channels": (5,), "layers": 1, "hidden": 9}, {"channels": (4, 3), "image_channels": 1, "z": 3}],
    ids=str,
)
def test_genforce_stylegan2(save, shape):
    state = reference.genforce_stylegan2_state(**shape)
    worse = {name: tensor + 1 for name, tensor in state.items()}
    z = latents(shape.get("z", 7))
    for content in (
        {"generator": worse, "discriminator": {"layer0.weight": torch.zeros(1)}, "generator_smooth": state},
        {"models": {"generator": worse, "generator_smooth": state}, "optimizers": {}},
        {"generator_smooth": {f"module.{name}": tensor for name, tensor in state.items()}},
        state,
    ):
        generator = load_generator(save(content))
        assert (generator.family, generator.layout) == ("stylegan2", "GenForce")
        assert_images(generator, reference.genforce_stylegan2(double(state), z.double()), z)
        if "generator" in content:
            assert "taken from 'generator_smooth'; the file also holds 'generator'" in generator.notes[0]
    generator.truncation = 0.5
    assert_images(generator, reference.genforce_stylegan2(double(state), z.double(), 0.5), z)


def test_genforce_class_labels(save, tmp_path):
    """A table whose rows are joined to z before both are normalised."""
    state = reference.genforce_stylegan2_state(z=12)
    table = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    z = latents(7)
    generator = load_generator(save({"generator_smooth": {**state, "mapping.label_weight": table}}))
    assert (generator.z_dim, generator.classes, generator.label) == (7, 3, 0)
    for label in range(3):
        generator.label = label
        joined = torch.cat([z, table[label].expand(3, -1)], 1).double()
        assert_images(generator, reference.genforce_stylegan2(double(state), joined), z)
    again = load_generator(save_generator(generator, tmp_path / "x.safetensors"))
    again.label = 2
    assert torch.equal(again(z), generator(z))
    assert again.weights_hash() == generator.weights_hash()
    with pytest.raises(ValueError, match="3 class labels"):
        save_generator(generator, tmp_path / "x.pt")


def test_genforce_colours_of_the_last_block_alone(save):
    state = reference.genforce_stylegan2_state(channels=(5, 4, 3))
    state = {n: t for n, t in state.items() if not n.startswith(("synthesis.output0", "synthesis.output1"))}
    z = latents(7)
    truth = reference.genforce_stylegan2(double(state), z.double())
    for name in (None, "synthesis.upsample.kernel"):  # a filter that is not used may be there
        state.pop(name, None)
        generator = load_generator(save(state))
        assert generator.architecture == "orig"
        assert_images(generator, truth, z)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [{}, {"channels": (7, 3), "image_channels": 1, "z": 4}], ids=str)
def test_genforce_progressive_gan(save, shape, fused):
    state = reference.genforce_pggan_state(**shape, fused=fused)
    z = latents(shape.get("z", 5))
    generator = load_generator(save({"generator_smooth": state, "generator": state}))
    assert (generator.family, generator.layout) == ("progan", "GenForce")
    assert_images(generator, reference.genforce_pggan(double(state), z.double(), fused), z)
    assert any("highest resolution" in note for note in generator.notes)


def test_genforce_older_progressive_gan(save):
    """The names of InterFaceGAN: layers from 0 or from 1, and wscale.bias."""
    state = generators_reference.progan_state()
    z = latents(5)
    truth = load_generator(save(state))
    for first in (0, 1):
        renamed = {}
        for name, tensor in state.items():
            layer, rest = name.split(".", 1)
            layer = f"layer{int(layer[5:]) - 1 + first}" if layer.startswith("layer") else layer
            renamed[f"{layer}.{rest.replace('wscale.b', 'wscale.bias')}"] = tensor
        generator = load_generator(save({**renamed, "lod": torch.zeros(())}))
        assert (generator.layout, truth.layout) == ("InterFaceGAN", "official")
        assert generator.weights_hash() == truth.weights_hash()
        assert torch.equal(generator(z), truth(z))


# -- TensorFlow's names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", ["Conv0_up", "Conv0"])
@pytest.mark.parametrize("scope", ["", "Gs/", "G_paper_1/", "dotted"])
def test_progressive_gan_with_tensorflow_names(save, up, scope):
    state = reference.tensorflow_progan_state(up=up)
    z = latents(5)
    stored = {f"{scope}{n}": t for n, t in state.items()}
    if scope == "dotted":
        stored = {name.replace("/", "."): tensor for name, tensor in state.items()}
    elif scope:
        stored = {name: tensor.numpy() for name, tensor in stored.items()}
    generator = load_generator(save(stored))
    assert (generator.family, generator.layout) == ("progan", "TensorFlow")
    assert_images(generator, reference.tensorflow_progan(double(state), z.double()), z)


# -- mmgeneration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"channels": (5,), "layers": 1}], ids=str)
def test_mmgeneration(save, shape):
    state = reference.mmgeneration_state(**shape)
    z = latents(6)
    worse = {f"generator.{name}": tensor + 1 for name, tensor in state.items()}
    discriminator = {"discriminator.convs.0.0.weight_orig": torch.zeros(2)}
    for prefix, more in (
        ("generator_ema.", {**worse, **discriminator}),
        ("generator_ema.module.", {"generator_ema.steps": torch.tensor(7), **discriminator}),
        ("", {}),
    ):
        content = {**{f"{prefix}{name}": tensor for name, tensor in state.items()}, **more}
        generator = load_generator(save({"meta": {"mmgen_version": "0.7"}, "state_dict": content}))
        assert (generator.family, generator.layout) == ("stylegan2", "mmgeneration")
        assert_images(generator, reference.mmgeneration(double(state), z.double()), z)
        assert any("BGR" in note for note in generator.notes)
        assert any("no mean latent" in note for note in generator.notes)
        if prefix:
            taken = next(note for note in generator.notes if "begin with 'generator_ema.'" in note)
            assert "'discriminator'" in taken
    # mmagic can keep the mean latent.
    generator = load_generator(save({**state, "w_avg": torch.ones(6)}))
    assert torch.equal(generator.latent_avg, torch.ones(6))


def test_logs_of_mmengine_beside_the_weights(save, monkeypatch):
    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._max_length = np.arange(4.0), 10

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer
    state = {f"generator_ema.{name}": tensor for name, tensor in reference.mmgeneration_state().items()}
    path = save({"state_dict": state, "message_hub": {"log_scalars": {"loss": HistoryBuffer()}}})
    monkeypatch.undo()
    assert load_generator(path).layout == "mmgeneration"


# -- DCGAN -------------------------------------------------------------------------------------------------------------

DCGANS = [
    {},
    {"widths": (16, 8, 4, 2), "z": 9},
    {"widths": (3,), "image_channels": 1},
    {"kernel": 2, "base": 3},
    {"kernel": 6, "base": 7, "bias": True},
    {"widths": (1, 1), "z": 1},
]


@pytest.mark.parametrize("shape", DCGANS, ids=str)
def test_dcgan(save, shape):
    module = reference.TutorialGenerator(**shape)
    state = module.state_dict()
    z = latents(shape.get("z", 5))
    truth = copy.deepcopy(module).double()(z.double())
    for content in (
        state,
        {"generator": state, "discriminator": {}},
        {"netG_state_dict": state, "epoch": 3},
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        {f"netG.{name}": tensor for name, tensor in state.items()} | {"netD.main.0.weight": torch.zeros(4, 3, 4, 4)},
    ):
        generator = load_generator(save(content), family="dcgan")
        assert_images(generator, truth, z)
        assert generator.image_size == truth.shape[-1]
        assert generator.z_dim == z.shape[1]
        assert len(generator.layers) == len(shape.get("widths", (6, 4))) + 1
    assert torch.equal(generator(z[1:2]), generator(z)[1:2])  # not by the statistics of the batch


def test_dcgan_is_editable(save, tmp_path):
    module = reference.TutorialGenerator(z=6, widths=(9, 8, 4), bias=True)
    generator = load_generator(save(module.state_dict()))
    z = latents(6)
    with torch.no_grad():
        images = generator(z)
        for name, layer in generator.layers.items():
            captured = generator.capture(name, z)
            torch.testing.assert_close(generator.finish(name, captured), images, rtol=0, atol=1e-6)
            assert captured.key.shape[1:] == (layer.in_channels, layer.key_resolution, layer.key_resolution)
            assert captured.value.shape[1:] == (layer.out_channels, layer.resolution, layer.resolution)
            assert generator.mean_style(name) is None
        index = 3  # the second transposed convolution of the module
        assert torch.equal(generator.layers["layer2"].weight, module.main[index].weight.transpose(0, 1))
        generator.layers["layer2"].weight.add_(0.1)
        module.main[index].weight.add_(0.1)
        assert not torch.allclose(generator(z), images)
        torch.testing.assert_close(generator(z), module(z), rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="truncation"):
        generator.truncation = 0.5
    saved = load_generator(save_generator(generator, tmp_path / "edited.pth"))
    assert saved.weights_hash() == generator.weights_hash()


@pytest.mark.parametrize("kernel", [2, 4, 6])
def test_dcgan_layers_as_the_solvers_see_them(save, kernel):
    from pyrewrite.ops.insertion import layer_values
    from pyrewrite.ops.insertion_geometry import InsertionTarget, crop_key

    module = reference.TutorialGenerator(z=6, widths=(9, 8, 4), kernel=kernel, bias=True)
    generator = load_generator(save(module.state_dict()))
    for name, layer in generator.layers.items():
        captured = generator.capture(name, latents(6, 1))
        view = generator.conv_layer(name)
        size = layer.resolution
        key = crop_key(view, captured.key[0], (0, 0, size, size))
        target = InsertionTarget(key, captured.value[0])
        values = layer_values(view, target)
        torch.testing.assert_close(values.reshape(captured.value[0].shape), captured.value[0], rtol=1e-4, atol=1e-4)


def test_dcgan_discriminators_and_other_stacks(save):
    discriminator = {f"main.{n}.weight": torch.randn(o, i, 4, 4) for n, o, i in ((0, 4, 3), (2, 8, 4), (5, 1, 8))}
    norm = {f"main.3.{part}": torch.ones(8) for part in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(CheckpointMismatchError, match="discriminator of DCGAN"):
        load_generator(save({**discriminator, **norm}))
    state = reference.TutorialGenerator(widths=(6, 5)).state_dict()
    for name, what in (
        ("main.4.running_var", r"missing \(1\): main\.4\.running_var"),
        ("main.0.weight", r"missing \(1\): main\.0\.weight"),
        ("main.6.weight", r"missing \(1\): main\.6\.weight"),
    ):
        broken = dict(state)
        tensor = broken.pop(name)
        with pytest.raises(CheckpointMismatchError, match=what):
            load_generator(save(broken))
        with pytest.raises(CheckpointMismatchError, match=r"extra \(1\): main\.9x\.weight|missing"):
            load_generator(save({**broken, "main.9x.weight": tensor}))
    for name, shape, what in (
        ("main.3.weight", (6, 5, 3, 3), "k even"),
        ("main.3.weight", (7, 5, 4, 4), r"main\.3\.weight is \(7, 5, 4, 4\), expected \(6, channels"),
        ("main.6.weight", (5, 2, 4, 4), "images of 2 channels"),
        ("main.1.running_mean", (5,), r"main\.1\.running_mean is \(5,\), expected \(6,\)"),
        ("main.0.weight", (5, 6), "expected 4 dimensions"),
    ):
        with pytest.raises(CheckpointMismatchError, match=what):
            load_generator(save({**state, name: torch.ones(shape)}))


# -- faults that all layouts share -------------------------------------------------------------------------------------

LAYOUTS = {
    "GenForce StyleGAN2": (reference.genforce_stylegan2_state, "synthesis.layer3.style.weight"),
    "GenForce PGGAN": (reference.genforce_pggan_state, "layer3.bias"),
    "TensorFlow": (reference.tensorflow_progan_state, "8x8/Conv1/weight"),
    "mmgeneration": (reference.mmgeneration_state, "convs.1.conv.style_modulation.linear.weight_orig"),
    "DCGAN": (lambda: reference.TutorialGenerator(widths=(6, 5)).state_dict(), "main.4.bias"),
    "NVIDIA": (nvidia_reference.random_state, "synthesis.b8.conv0.affine.weight"),
}


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request):
    make, name = LAYOUTS[request.param]
    return make(), name


def test_missing_names_are_those_of_the_file(save, layout):
    state, name = layout
    del state[name]
    with pytest.raises(CheckpointMismatchError, match=rf"missing \(1\): {name}; expected"):
        load_generator(save(state))


def test_extra_and_renamed_names_are_listed(save, layout):
    state, name = layout
    with pytest.raises(CheckpointMismatchError, match=r"extra \(1\): something; expected"):
        load_generator(save({**state, "something": torch.zeros(1)}))
    state[f"{name}x"] = state.pop(name)
    with pytest.raises(CheckpointMismatchError, match=rf"missing \(1\): {name}; extra \(1\): {name}x"):
        load_generator(save(state))


def test_wrong_shapes_name_the_file_s_tensor(save, layout):
    state, name = layout
    state[name] = torch.zeros(3, *state[name].shape[1:]) if state[name].ndim < 4 else state[name][..., :1]
    with pytest.raises(CheckpointMismatchError, match=rf"{name} is \(.*expected|expected"):
        load_generator(save(state))


def test_half_precision_is_computed_in_float32(save, layout):
    state, _ = layout
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    widened = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in half.items()}
    generator, truth = load_generator(save(half)), load_generator(save(widened))
    assert generator.dtype == torch.float32
    assert any("float16" in note for note in generator.notes)
    z = latents(generator.z_dim)
    torch.testing.assert_close(generator(z), truth(z), rtol=0, atol=1e-3)


def test_values_that_are_not_finite(save, layout):
    state, name = layout
    state[name] = state[name].clone()
    state[name].view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteWeightsError, match="NaN"):
        load_generator(save(state))


def test_cut_off_files(save, layout):
    path = save(layout[0])
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpointError, match=rf"truncated.*{size} bytes"):
            load_generator(path)


def test_prefixes_of_wrappers(save, layout):
    state, _ = layout
    plain = load_generator(save(state))
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        assert load_generator(save(wrapped)).weights_hash() == plain.weights_hash()


# -- architectures that are refused by name ----------------------------------------------------------------------------


def test_other_architectures(save):
    state = reference.genforce_stylegan2_state()
    with pytest.raises(CheckpointMismatchError, match=r"label_weight is \(9, 7\), an embedding of 7 numbers, expected"):
        load_generator(save({**state, "mapping.label_weight": torch.zeros(9, 7)}))
    middle_only = {n: t for n, t in state.items() if not n.startswith(("synthesis.output0", "synthesis.output2"))}
    with pytest.raises(CheckpointMismatchError, match=r"missing .*synthesis\.output0\.weight"):
        load_generator(save(middle_only))
    growing = {**reference.genforce_pggan_state(), "lod": torch.tensor(1.5)}
    with pytest.raises(CheckpointMismatchError, match=r"lod is 1\.5, expected 0"):
        load_generator(save(growing))
    growing = {**reference.tensorflow_progan_state(), "lod": torch.tensor(2.0)}
    with pytest.raises(CheckpointMismatchError, match="lod is 2, expected 0"):
        load_generator(save(growing))
    conditional = {**reference.mmgeneration_state(), "embed.linear.weight_orig": torch.zeros(6, 3)}
    with pytest.raises(CheckpointMismatchError, match="class labels"):
        load_generator(save(conditional))


def test_names_twice(save):
    state = reference.mmgeneration_state()
    with pytest.raises(CheckpointMismatchError, match="twice"):
        load_generator(save({**state, "conv1.noise.weight": torch.zeros(1)}))
    state = reference.tensorflow_progan_state()
    with pytest.raises(CheckpointMismatchError, match="twice"):
        load_generator(save({**state, "Gs/4x4/Conv/bias": torch.zeros(6)}))


# -- what public code made of the same weights -------------------------------------------------------------------------

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_images_of_the_public_code(save, path):
    with np.load(path) as stored:
        arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    state = {name.removeprefix("weights/"): t for name, t in arrays.items() if name.startswith("weights/")}
    settings = {name.removeprefix("settings/"): t.item() for name, t in arrays.items() if name.startswith("settings/")}
    generator = load_generator(save({"G_ema": state, **settings} if settings else state))
    if generator.classes:
        generator.label = 1
    with torch.no_grad():
        found = generator(arrays["z"])
        torch.testing.assert_close(found, arrays["images"].clamp(-1, 1), rtol=0, atol=TOLERANCE)
        assert (found.abs() < 1).float().mean() > 0.2  # and not by the clamp
        if "truncated" in arrays:
            generator.truncation = 0.6
            torch.testing.assert_close(generator(arrays["z"]), arrays["truncated"].clamp(-1, 1), rtol=0, atol=TOLERANCE)
        if "transformed" in arrays:  # StyleGAN3, with a turn, a stretch and a shift of the user's
            generator.truncation = 1
            generator.input.transform.copy_(arrays["transform"])
            wanted = arrays["transformed"].clamp(-1, 1)
            torch.testing.assert_close(generator(arrays["z"]), wanted, rtol=0, atol=TOLERANCE)


def test_golden_files_are_there():
    assert len(list(GOLDEN.glob("*.npz"))) == 11
