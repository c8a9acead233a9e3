"""The whole job on a device that is not the processor and, where there are two, not the current one: nothing mixes
devices on the way. On a GPU if there is one, else on a GPU of pretence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import families_reference
import generators_reference
import pytest
import stylegan3_reference
import torch
from another_device import another_device
from click.testing import CliRunner
from interface_session_support import Client, box, compose
from support import mask_url
from torch import nn

import pyrewrite as pr
from pyrewrite._memory import free_memory, is_out_of_memory
from pyrewrite.cli import main
from pyrewrite.demo import demo_edits, run_demo
from pyrewrite.errors import NonFiniteError
from pyrewrite.evaluation import edit_report
from pyrewrite.interface import Session
from pyrewrite.ops import _library
from pyrewrite.rewriting import LayerUpdate
from pyrewrite.statistics import SecondMoment, UnitQuantiles, collect

pytestmark = [
    pytest.mark.skipif(
        torch.backends.cuda.is_built() and not torch.cuda.is_available(), reason="torch has CUDA and no GPU to use"
    ),
    pytest.mark.filterwarnings("ignore::pyrewrite.EditWarning"),  # a few steps on a few images
]

REAL = torch.cuda.is_available()
DEVICE = f"cuda:{torch.cuda.device_count() - 1}" if REAL else "cuda:1"  # the current one is cuda:0
CLOSE = 1e-3 if REAL else 1e-4  # other kernels of the same numbers
BOX = mask_url(128, 32, 32, 96, 96)
QUICK = {"rank": 2, "steps": 3}


@pytest.fixture(autouse=True)
def watched(monkeypatch) -> Iterator:
    if REAL:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default rounds convolutions' factors
        yield None
        return
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
    return x.device == torch.device(DEVICE)


@pytest.mark.skipif(REAL, reason="a GPU does")
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


@pytest.mark.parametrize("name", ["peeps", "peeps-progan"])
def test_images_keys_and_statistics_are_those_of_the_processor(name):
    here, there = pr.load_generator(name), pr.load_generator(name, device=DEVICE)
    assert there.weights_hash() == here.weights_hash()
    images = there.images(range(3), batch_size=2)
    assert on_device(images)
    torch.testing.assert_close(images.cpu(), here.images(range(3)), atol=CLOSE, rtol=CLOSE)
    z = there.latents([0, 1])
    layer = list(there.layers)[3]
    keys = there.keys(layer, z.cpu())  # latents may come from anywhere
    torch.testing.assert_close(keys.cpu(), here.keys(layer, z.cpu()), atol=CLOSE, rtol=CLOSE)
    there.precision = "bf16"
    assert on_device(there(z[:1]))
    there.precision = "fp32"
    assert there.unusual_picture() is None


FILES = {
    "stylegan2": lambda: generators_reference.stylegan2_state(),
    "genforce": lambda: families_reference.genforce_stylegan2_state(),
    "mmgeneration": lambda: families_reference.mmgeneration_state(),
    "dcgan": lambda: families_reference.TutorialGenerator().state_dict(),
    "stylegan3": lambda: (lambda state, settings: {"G_ema": state, **settings})(*stylegan3_reference.random_state()),
    "stylegan3 with labels": lambda: (lambda s, t: {"G_ema": s, **t})(*stylegan3_reference.random_state(classes=3)),
}


@pytest.mark.parametrize("family", FILES)
def test_every_family_runs_layer_by_layer(family, tmp_path):
    torch.save(FILES[family](), tmp_path / "x.pt")
    here, there = pr.load_generator(tmp_path / "x.pt"), pr.load_generator(tmp_path / "x.pt", device=DEVICE)
    there.truncation = here.truncation = 0.7 if hasattr(here, "truncated") else 1
    z = there.latents([0, 3])
    torch.testing.assert_close(there(z).cpu(), here(z.cpu()), atol=CLOSE, rtol=CLOSE)
    for name, captured in zip(there.layers, there.captures(z), strict=True):
        value = there.value(name, captured)
        assert on_device(there.finish(name, captured, value))
        style = there.mean_style(name)
        assert style is None or on_device(style)
    if hasattr(there, "mixed"):
        assert on_device(there.synthesis(there.mixed(z[:1], z[1:].cpu(), 2).cpu()))
        there.estimated_mean_latent()
    for mode in ("random", "none") if hasattr(there, "noise_mode") else ():
        there.noise_mode = mode
        assert on_device(there(z))
    there.weights_hash()


def test_a_module_of_the_users():
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.2), nn.ConvTranspose2d(8, 4, 4, 2, 1)).eval()
    network = pr.as_editable(
        module.requires_grad_(False).to(DEVICE), torch.randn(6, 3, 8, 8)
    )  # the sample is elsewhere
    found = pr.Rewriter(network, "2", samples=6, cache_dir=False, progress=False)
    assert found.moment.count == 6 * 64
    url = mask_url(16, 4, 4, 12, 12)
    record = pr.Edit(object=pr.Selection(0, url), paste=pr.Selection(1, url), context=[pr.Selection(2, url)])
    found.solve(record, rank=1, steps=2, targets="context").apply_(network)


def test_statistics_are_kept_read_merged_and_resumed(peeps, tmp_path):
    found = collect(peeps, "layer5", samples=6, cache_dir=tmp_path, quantiles=True, batch_size=2)
    again = collect(peeps, "layer5", samples=6, cache_dir=tmp_path, quantiles=True)
    assert again.from_cache
    assert on_device(again.moment.total)
    assert torch.equal(again.moment.total.cpu(), found.moment.total.cpu())
    again.moment.merge(SecondMoment(found.moment.d).merge(found.moment))
    other = SecondMoment(found.moment.d, device="cuda:0")
    other.load_state_dict(again.moment.state_dict())
    assert other.count == 2 * found.moment.count
    for sketch in (found.quantiles, again.quantiles):
        sketch.merge(UnitQuantiles(found.moment.d).merge(found.quantiles))
        assert on_device(sketch.quantile(torch.tensor([0.1, 0.9])))
        assert on_device(sketch.rank(torch.randn(2, found.moment.d)))
    found.moment.to_("cpu").whitener(0.1)


def test_not_finite_keys_are_seen_once_they_have_arrived(peeps):
    with torch.no_grad():
        peeps.layers["layer3"].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer5 are NaN"):
        collect(peeps, "layer5", samples=6, cache_dir=False, batch_size=2)


SETTINGS = [
    {},
    {"preset": "official"},
    {"preset": "official", "method": "low_rank"},
    {"method": "least_squares"},
    {"method": "low_rank", "preserve": 0.1, "weighting": "alpha", "margin": 2},
    {"key_method": "svd"},
    {"key_method": "mean", "rank": 1},
    {"key_method": "gandissect"},
]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("peeps", {}), ("peeps", {"method": "least_squares"}), *(("peeps-progan", settings) for settings in SETTINGS)],
    ids=str,
)
def test_solving_applying_undoing_and_files(name, settings, tmp_path):
    g = pr.load_generator(name, device=DEVICE)
    found = rewriter(g)
    kept = {n: t.cpu().clone() for n, t in g.state_dict().items()}
    quick = QUICK | ({"rank": 1} if "preset" in settings or "rank" in settings else {})
    record = edit(protect=[pr.Selection(4, BOX)]) if not settings else edit()
    patch = found.solve(record, **{**quick, **settings})
    patch.save(tmp_path / "p.safetensors")
    loaded = pr.LowRankPatch.load(tmp_path / "p.safetensors")
    assert loaded.digest == patch.digest
    with loaded.applied(g), patch.scaled(0.5).applied(g):
        assert any(not torch.equal(t.cpu(), kept[n]) for n, t in g.state_dict().items())
        assert on_device(g.images([0]))
    assert all(torch.equal(t.cpu(), kept[n]) for n, t in g.state_dict().items())


def test_removing_searching_pasting_and_several_edits(peeps):
    found = rewriter(peeps)
    found.erase(edit(), units=3, **QUICK)
    found.erase(edit(), units=3, preset="official", steps=2)
    found.zero(edit(), rank=2)
    assert len(found.search(edit(), k=2)) == 2
    parts = found.activations([4, 5])
    images, alpha = found.pasted(edit(), parts)
    patch = found.solve([edit(), edit()], **QUICK)
    after = found.rendered(parts, patch)
    assert on_device(after)
    report = edit_report(
        peeps.images([4, 5]), after, attribute="hat", wanted=1, mask=(alpha > 0).float(), pasted=images, alpha=alpha
    )
    json.dumps(report.as_dict())
    pr.stack([patch, patch.scaled(0.5)], warn_above=2)


def test_a_patch_of_factors_on_the_device(peeps):
    patch = rewriter(peeps).solve(edit(), **QUICK)
    (update,) = patch.updates
    moved = LayerUpdate(update.layer, update.direction.to(DEVICE), update.lambda_.to(DEVICE))
    there = pr.LowRankPatch([moved], name="there")
    assert there.digest == patch.digest
    assert pr.LowRankPatch.from_bytes(there.to_bytes()).digest == patch.digest
    stacked = pr.stack([patch, there.scaled(0.5)], warn_above=2)
    weight = peeps.layers[update.layer].weight
    kept = weight.cpu().clone()
    with stacked.applied(peeps):
        assert not torch.equal(weight.cpu(), kept)
    peeps.patches = None
    there.apply_(peeps)
    peeps.to("cuda:0")  # with a patch on it
    there.remove_(peeps)
    assert torch.equal(peeps.layers[update.layer].weight.cpu(), kept)


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    edit().save(tmp_path / "edit.json")
    path = lambda name: str(tmp_path / name)  # noqa: E731
    g = ["peeps-progan", "--device", DEVICE]
    for arguments in (
        ["info", *g],
        ["stats", *g, "layer6", "--samples", "4", "--json"],
        ["solve", *g, path("edit.json"), "--layer", "layer6", "--samples", "4", "--rank", "2", "--steps", "2",
         "--out", path("p.safetensors")],
        ["sample", *g, "--images", "0-2", "--out", path("s.png")],
        ["sample", *g, "--patch", path("p.safetensors"), "--images", "0-2", "--out", path("s.png")],
        ["evaluate", *g, path("p.safetensors"), "--images", "5-7", "--attributes", "--edit", path("edit.json"),
         "--out", path("e.png")],
    ):  # fmt: skip
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_the_demo(tmp_path):
    only = [demo_edits()[-1].name]
    result = run_demo(tmp_path, only=only, count=3, official=False, device=DEVICE)
    assert result.edits
    json.dumps(result.to_dict())


def test_a_session_of_the_interface(peeps, tmp_path):
    session = Session(peeps, layer="layer6", samples=6, cache_dir=False, folder=tmp_path, strip="0-3")
    try:
        client = compose(Client(session), mask=box(20, 20, 45, 45, 64))
        client.settle()
        client.do("set", rank=2, steps=3, margin=0)
        for action, fields in (("execute", {}), ("undo", {}), ("redo", {})):
            client.do(action, **fields)
            client.settle()
        client.get("pictures", numbers=[0, 3], size=64)
        client.do("click", image=1, y=32, x=35, alike=0.5)
        assert not [m for m, _ in client.messages if m["type"] == "error"]
    finally:
        session.close()


def test_memory_that_torch_keeps_is_free_and_libraries_run_out_of_it_too(watched):
    if not REAL:
        assert free_memory(torch.device(DEVICE)) == 8 << 30  # 6 of the driver's, 3 - 1 that torch keeps
    assert free_memory(torch.device(DEVICE)) > 0
    for text in ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"):
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"))
