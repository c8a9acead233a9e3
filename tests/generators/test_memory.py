"""What rendering and statistics need of memory: measured in processes of their own."""

import subprocess
import sys
from pathlib import Path

import generators_reference
import pytest
import torch

from pyrewrite import _memory
from pyrewrite.generators import load_generator, network
from pyrewrite.rewriting.targets import capture

TESTS = Path(__file__).parent.parent
MEASURE = """
import resource, sys
import torch
torch.set_num_threads(1)
import pyrewrite
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes
"""


def run(code, *arguments):
    command = [sys.executable, "-c", MEASURE + code, *map(str, arguments)]
    # Not in the source folder, which would hide the installed package.
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.slow
def test_the_largest_published_stylegan2_loads_and_renders_under_3_gb(tmp_path):
    """Config F at 1024 x 1024, of random weights."""
    state = generators_reference.stylegan2_state(
        channels=(512, 512, 512, 512, 512, 256, 128, 64, 32), z=512, mapping=(512,) * 8
    )
    torch.save({"g_ema": state, "latent_avg": torch.zeros(512)}, tmp_path / "x.pt")
    code = """
x = pyrewrite.load_generator(sys.argv[1]).images([0])
print(peak(), x.shape[-1], int(x.isfinite().all()))
"""
    kilobytes, size, finite = run(code, tmp_path / "x.pt")
    assert (size, finite) == (1024, 1)
    assert kilobytes < 3e6


def test_statistics_need_no_more_memory_for_more_samples(tmp_path):
    """Keys of 6000 images would take 250 MB, their latents 12 MB."""
    state = generators_reference.stylegan2_state(channels=(8, 8), z=512, mapping=(512, 8))
    torch.save({"g_ema": state, "latent_avg": torch.zeros(8)}, tmp_path / "x.pt")
    code = """
from pyrewrite.generators import base
from pyrewrite.statistics import collect
sys.modules[collect.__module__].LATENTS = base._ROWS_PER_DRAW = 256  # parts that few samples fill too
g = pyrewrite.load_generator(sys.argv[1])
for samples in (600, 6000):
    collect(g, "layer4", samples=samples, cache_dir=False)
    print(peak())
"""
    few, many = run(code, tmp_path / "x.pt")
    assert many - few < 8e3


def test_latents_drawn_in_parts_are_the_same(tmp_path, monkeypatch):
    from pyrewrite.statistics import collect

    torch.save(generators_reference.stylegan2_state(), tmp_path / "x.pt")
    generator = load_generator(tmp_path / "x.pt")
    whole = collect(generator, "layer3", samples=23, batch_size=3, cache_dir=False).moment.matrix
    monkeypatch.setattr(sys.modules[collect.__module__], "LATENTS", 7)
    assert torch.equal(collect(generator, "layer3", samples=23, batch_size=3, cache_dir=False).moment.matrix, whole)


class Small:
    """A generator for which more than `images` at once do not fit into memory."""

    def __init__(self, images, error):
        self.generator, self.calls = load_generator("peeps-progan"), []
        forward = self.generator.forward

        def limited(z):
            self.calls.append(len(z))
            if len(z) > images:
                raise error
            return forward(z)

        self.generator.forward = limited


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_rendering_goes_on_in_smaller_batches_where_memory_runs_out(error):
    small = Small(2, error)
    wanted = load_generator("peeps-progan").images(range(9))
    with pytest.warns(RuntimeWarning, match="out of memory with . images at a time at rendering") as caught:
        found = small.generator.images(range(9), batch_size=9)
    assert torch.equal(found, wanted)
    assert len(caught) == 2
    assert caught[0].filename == __file__
    assert small.calls == [9, 4, 2, 2, 2, 2, 1]


def test_one_image_that_does_not_fit_and_other_errors():
    small = Small(0, MemoryError("no"))
    with pytest.raises(MemoryError, match="no"):
        small.generator.images([1])
    with pytest.raises(RuntimeError, match="other"):
        Small(0, RuntimeError("other")).generator.images(range(3))
    assert small.calls == [1]


def test_activations_are_captured_in_smaller_batches_where_memory_runs_out(monkeypatch):
    generator = load_generator("peeps-progan")
    wanted = capture(generator, "layer3", range(7), 1)
    whole, calls = generator.capture, []

    def limited(layer, z):
        calls.append(len(z))
        if len(z) > 2:
            raise MemoryError
        return whole(layer, z)

    monkeypatch.setattr(generator, "capture", limited)
    with pytest.warns(RuntimeWarning, match="out of memory with . images at a time at layer3"):
        found = capture(generator, "layer3", range(7), 1)
    assert torch.equal(found.value, wanted.value)
    assert calls == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(network, "free_memory", lambda device: 0)
    calls.clear()
    capture(generator, "layer3", range(3), 1)
    assert calls == [1, 1, 1]
    monkeypatch.setattr(generator, "capture", lambda layer, z: limited(layer, z.expand(3, -1)))
    with pytest.raises(MemoryError):
        capture(generator, "layer3", [0], 1)


def test_batches_are_chosen_by_what_is_free(monkeypatch):
    generator = load_generator("peeps-progan")
    assert generator.batch_size() == 16
    for free, expected in ((1 << 40, 16), (1 << 26, 1), (0, 1), (1 << 28, 4)):
        monkeypatch.setattr(network, "free_memory", lambda device, free=free: free)
        small = generator.batch_size()
        assert 1 <= small <= expected
    assert _memory.free_memory(torch.device("cpu")) > 1 << 20
    calls = Small(99, None)
    calls.generator.images(range(3))
    assert calls.calls == [small] * (3 // small) + [3 % small] * bool(3 % small)
