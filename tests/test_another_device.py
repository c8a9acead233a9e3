"""The whole job on a device that is not the processor and not the current one: nothing mixes devices on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator

import families_reference
import generators_reference
import pytest
import stylegan3_reference
import torch
from another_device import DeviceTensor, another_device
from click.testing import CliRunner
from interface_session_support import Client, compose
from support import mask_url
from torch import nn

import pyrewrite as pr
from pyrewrite.demo import run_demo
from pyrewrite.interface import Session
from pyrewrite.ops import _library
from pyrewrite.statistics import SecondMoment, UnitQuantiles, collect

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="stands in for CUDA in a torch without it")

DEVICE = "cuda:1"  # the current one is cuda:0
BOX = mask_url(128, 32, 32, 96, 96)
QUICK = {"rank": 2, "steps": 3}


@pytest.fixture(autouse=True)
def watched(monkeypatch) -> Iterator:
    # Kernels for CUDA are not for a GPU of pretence.
    monkeypatch.setattr(_library, "_has_cuda_kernel", lambda operator: False)
    with another_device() as watched:
        yield watched


def edit(**fields) -> pr.Edit:
    return pr.Edit(
        object=pr.Selection(0, BOX), paste=pr.Selection(1, BOX), context=[pr.Selection(2, BOX), pr.Selection(3, BOX)],
        name="test", **fields,
    )  # fmt: skip


@pytest.fixture
def peeps(watched):
    return pr.load_generator("peeps-progan", device=DEVICE)


def rewriter(generator, layer: str = "layer6") -> pr.Rewriter:
    return pr.Rewriter(generator, layer, samples=6, cache_dir=False, progress=False)


def on_device(x: torch.Tensor) -> bool:
    return isinstance(x, DeviceTensor) and x.device == torch.device(DEVICE)


def test_the_device_refuses_what_a_gpu_refuses():
    x = torch.ones(2, 3, device=DEVICE)
    for mixing in (lambda: x + torch.ones(3), lambda: torch.ones(3).add_(x.sum()), lambda: x.numpy(),
                   lambda: x @ torch.ones(3), lambda: x + torch.ones(2, 3, device="cuda"),
                   lambda: torch.ones(2)[torch.zeros(1, dtype=torch.long, device=DEVICE)],
                   lambda: torch.stack([x.sum(), torch.tensor(1.0)]), lambda: x.long() @ x.long().t()):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError)):
            mixing()
    assert (x * torch.tensor(2.0)).device == torch.device(DEVICE)
    assert torch.zeros(2, device="cuda").device == torch.device("cuda:0")
    late = torch.empty(2, 3, pin_memory=True).copy_(x, non_blocking=True)
    assert late.isnan().all()  # not there before somebody has waited
    torch.cuda.synchronize(DEVICE)
    assert (late == 1).all()


STATES = {
    "stylegan2": lambda: generators_reference.stylegan2_state(),
    "progan": lambda: generators_reference.progan_state(),
    "genforce": lambda: families_reference.genforce_stylegan2_state(),
    "mmgeneration": lambda: families_reference.mmgeneration_state(),
}


@pytest.mark.parametrize("name", ["peeps", "peeps-progan"])
def test_images_keys_and_statistics_are_those_of_the_processor(name):
    here, there = pr.load_generator(name), pr.load_generator(name, device=DEVICE)
    assert there.weights_hash() == here.weights_hash()
    images = there.images(range(3), batch_size=2)
    assert on_device(images)
    torch.testing.assert_close(images.cpu(), here.images(range(3)), atol=1e-4, rtol=1e-4)
    z = there.latents([0, 1])
    layer = list(there.layers)[3]
    keys = there.keys(layer, z.cpu())  # latents may come from anywhere
    torch.testing.assert_close(keys.cpu(), here.keys(layer, z.cpu()), atol=1e-4, rtol=1e-4)
    for precision in there.precisions:
        there.precision = precision
        assert on_device(there(z[:1]))
    assert there.unusual_picture() is None
