from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pyrewrite.errors import NonFiniteError, UnknownLayerError
from pyrewrite.generators import load_generator
from pyrewrite.statistics import SecondMoment, collect, default_folder
from pyrewrite.statistics.collect import FiniteKeys


def exact(generator, samples: int, seed: int = 1) -> torch.Tensor:
    keys = generator.keys("layer2", generator.latents(range(samples), seed=seed)).double()
    rows = keys.permute(0, 2, 3, 1).reshape(-1, keys.shape[1])
    return rows.T @ rows / len(rows)


def files(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_moment_of_all_pixels(tiny):
    found = collect(tiny, "layer2", samples=20, cache_dir=False)
    assert (found.moment.count, found.samples, found.seed, found.from_cache) == (500, 20, 1, False)
    assert torch.allclose(found.moment.matrix, exact(tiny, 20), rtol=1e-5, atol=1e-6)
    assert found.quantiles is None
    one = collect(tiny, "layer2", samples=1, seed=3, cache_dir=False)
    assert torch.allclose(one.moment.matrix, exact(tiny, 1, 3), rtol=1e-5, atol=1e-6)


def test_batch_size_changes_rounding_only(tiny):
    whole = collect(tiny, "layer2", samples=23, batch_size=23, cache_dir=False, quantiles=True)
    for size in (1, 4, 22, 100):
        other = collect(tiny, "layer2", samples=23, batch_size=size, cache_dir=False, quantiles=True)
        assert other.batch_size == min(size, 23)
        assert torch.allclose(other.moment.matrix, whole.moment.matrix, rtol=1e-6, atol=1e-7)
        assert torch.allclose(other.quantiles.quantile(0.9), whole.quantiles.quantile(0.9), rtol=1e-5)


def test_second_run_reads_the_file(tiny, tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    first = collect(tiny, "layer2", samples=20, cache_dir=folder)
    runs = len(tiny.runs)
    second = collect(tiny, "layer2", samples=20, cache_dir=folder, batch_size=3)
    assert len(tiny.runs) == runs
    assert (first.from_cache, second.from_cache) == (False, True)
    assert torch.equal(first.moment.total, second.moment.total)
    assert second.moment.count == 500
    (name,) = files(folder)
    assert name.startswith("layer2-")
    assert SecondMoment.load(folder / name).count == 500  # the official tool's members


def test_second_run_of_a_bundled_generator_is_the_fast_one(tmp_path):
    generator = load_generator("peeps")
    first = collect(generator, "layer5", samples=40, cache_dir=tmp_path, quantiles=True)
    second = collect(generator, "layer5", samples=40, cache_dir=tmp_path, quantiles=True)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.seconds < first.seconds
    assert torch.equal(first.moment.total, second.moment.total)
    assert torch.equal(first.quantiles.quantile([0.1, 0.9]), second.quantiles.quantile([0.1, 0.9]))
    keys = generator.keys("layer5", generator.latents(range(40)))
    rows = keys.detach().double().permute(0, 2, 3, 1).reshape(-1, keys.shape[1])
    expected = rows.T @ rows / len(rows)
    assert (first.moment.matrix - expected).norm() < 1e-6 * expected.norm()
    whitened = first.moment.whitener(0.0) @ expected @ first.moment.whitener(0.0)
    assert (whitened - torch.eye(len(expected))).abs().max() < 1e-2
    with pytest.raises(UnknownLayerError, match="layer99"):
        collect(generator, "layer99", samples=2, cache_dir=tmp_path)


def test_quantiles_are_added_to_an_older_file(tiny, tmp_path):
    collect(tiny, "layer2", samples=20, cache_dir=tmp_path)
    again = collect(tiny, "layer2", samples=20, cache_dir=tmp_path, quantiles=True)
    assert not again.from_cache
    assert again.quantiles.count == 500
    for quantiles in (True, False):
        found = collect(tiny, "layer2", samples=20, cache_dir=tmp_path, quantiles=quantiles)
        assert found.from_cache
        assert (found.quantiles is not None) == quantiles
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("change", ["weights", "truncation", "samples", "seed", "precision"])
def test_every_setting_has_its_own_file(tiny, tmp_path, change):
    settings = {"samples": 20, "seed": 1, "precision": "fp32", "cache_dir": tmp_path}
    first = collect(tiny, "layer2", **settings)
    if change == "weights":
        tiny.weight[0, 0] += 1e-3
    elif change == "truncation":
        tiny.truncation = 0.5
    else:
        settings[change] = {"samples": 21, "seed": 2, "precision": "tf32"}[change]
    other = collect(tiny, "layer2", **settings)
    assert not other.from_cache
    assert change == "precision" or not torch.equal(first.moment.matrix, other.moment.matrix)
    assert len(files(tmp_path)) == 2


def damage(path, how: str) -> None:
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
        return
    if how == "empty":
        path.write_bytes(b"")
        return
    if how == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
        return
    if how == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
        return
    if how == "folder":
        path.unlink()
        path.mkdir()
        return
    with np.load(path) as file:
        arrays = dict(file)
    key = json.loads(str(arrays["key"]))
    if how == "other generator":
        arrays["key"] = np.array(json.dumps({**key, "weights": "0" * 64}, sort_keys=True))
    elif how == "no key":
        del arrays["key"]
    elif how == "pickled key":
        arrays["key"] = np.array([{}], dtype=object)
    elif how == "other d":
        arrays["mom2"] = np.eye(5)
    elif how == "other count":
        arrays["count"] = np.int64(499)
    elif how == "NaN":
        arrays["mom2"][2, 1] = np.nan
    elif how == "quantiles of others":
        arrays["quantile_count"] = np.int64(7)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "empty", "picture", "flipped", "other generator", "no key", "pickled key", "other d"),
        *("other count", "NaN", "quantiles of others"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_computed_again(tiny, tmp_path, how):
    first = collect(tiny, "layer2", samples=20, cache_dir=tmp_path, quantiles=True)
    (name,) = files(tmp_path)
    damage(tmp_path / name, how)
    with pytest.warns(RuntimeWarning, match="computing them again"):
        second = collect(tiny, "layer2", samples=20, cache_dir=tmp_path, quantiles=True)
    assert not second.from_cache
    assert torch.equal(first.moment.total, second.moment.total)
    assert collect(tiny, "layer2", samples=20, cache_dir=tmp_path, quantiles=True).from_cache


def test_a_folder_in_the_place_of_the_file(tiny, tmp_path):
    collect(tiny, "layer2", samples=20, cache_dir=tmp_path)
    damage(tmp_path / files(tmp_path)[0], "folder")
    with pytest.warns(RuntimeWarning) as caught:
        assert collect(tiny, "layer2", samples=20, cache_dir=tmp_path).moment.count == 500
    assert any("could not be kept" in str(w.message) for w in caught)


def test_statistics_are_returned_where_they_cannot_be_kept(tiny, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(RuntimeWarning, match="could not be kept"):
        found = collect(tiny, "layer2", samples=20, cache_dir=tmp_path / "file")
    assert found.moment.count == 500


def test_default_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PYREWRITE_CACHE", raising=False)
    assert default_folder() == tmp_path / ".cache" / "pyrewrite"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "pyrewrite"
    monkeypatch.setenv("PYREWRITE_CACHE", str(tmp_path / "own"))
    collect(tiny, "layer2", samples=2)
    assert len(files(tmp_path / "own")) == 1
    collect(tiny, "layer2", samples=3, cache_dir=False)
    assert len(files(tmp_path / "own")) == 1


def test_nan_names_layer_and_images_and_leaves_no_file(tiny, tmp_path):
    tiny.poison = {3, 17}
    with pytest.raises(NonFiniteError, match=r"layer2.*image 3:"):
        collect(tiny, "layer2", samples=20, batch_size=4, cache_dir=tmp_path)
    with pytest.raises(NonFiniteError, match=r"images 3, 17:"):
        collect(tiny, "layer2", samples=20, batch_size=20, cache_dir=tmp_path)
    tiny.poison = set(range(20))
    with pytest.raises(NonFiniteError, match=r"6, 7 and 12 more"):
        collect(tiny, "layer2", samples=20, batch_size=20, cache_dir=tmp_path)
    assert files(tmp_path) == []


def test_large_finite_keys_are_not_taken_for_infinite():
    """Their sum overflows, in float16 and in float32."""
    for largest, dtype in ((6e4, torch.float16), (3e38, torch.float32)):
        keys = torch.full((3, 2, 5, 5), largest, dtype=dtype)
        finite = FiniteKeys("layer2")
        finite.look(keys, 0)
        keys[2, 1, 4, 4] = -float("inf")
        with pytest.raises(NonFiniteError, match="image 9:"):
            finite.look(keys, 7)
            finite.finish()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_on_a_gpu_the_answer_comes_one_batch_later():
    keys = torch.ones(3, 2, 5, 5, device="cuda")
    keys[1, 0, 0, 0] = float("nan")
    finite = FiniteKeys("layer2")
    finite.look(keys, 4)
    with pytest.raises(NonFiniteError, match="image 5:"):
        finite.look(torch.ones_like(keys), 7)
    finite.finish()
    finite.look(keys, 4)
    with pytest.raises(NonFiniteError, match="image 5:"):
        finite.finish()


def test_batches_are_halved_when_memory_runs_out(tiny, tmp_path):
    reference = collect(tiny, "layer2", samples=20, cache_dir=False)
    tiny.memory, tiny.runs = 6, []
    with pytest.warns(RuntimeWarning, match="out of memory with") as caught:
        found = collect(tiny, "layer2", samples=20, batch_size=20, cache_dir=tmp_path)
    assert len(caught) == 2
    assert found.batch_size == 5
    assert tiny.runs == [20, 10, 5, 5, 5, 5]
    assert found.moment.count == 500
    assert torch.allclose(found.moment.matrix, reference.moment.matrix, rtol=1e-6)
    tiny.memory = 0
    with pytest.warns(RuntimeWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        collect(tiny, "layer2", samples=2, cache_dir=False)


def test_other_errors_are_not_taken_for_memory(tiny):
    def keys(layer, z):
        raise RuntimeError("expected scalar type Float")

    tiny.keys = keys
    with pytest.raises(RuntimeError, match="scalar type"):
        collect(tiny, "layer2", samples=20, cache_dir=False)


def test_progress(tiny, capsys):
    seen = []
    collect(tiny, "layer2", samples=10, batch_size=4, cache_dir=False, progress=lambda *a: seen.append(a))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert capsys.readouterr() == ("", "")
    collect(tiny, "layer2", samples=10, batch_size=4, cache_dir=False, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "keys of layer2" in err
    with pytest.raises(TypeError, match="progress"):
        collect(tiny, "layer2", samples=10, cache_dir=False, progress="yes")


def test_an_interrupted_run_leaves_no_file(tiny, tmp_path):
    def stop(done, total):
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tiny, "layer2", samples=10, batch_size=4, cache_dir=tmp_path, progress=stop)
    assert files(tmp_path) == []
    assert not collect(tiny, "layer2", samples=10, cache_dir=tmp_path).from_cache


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": -1}, {"samples": 2.5}, {"batch_size": 0}])
def test_refused(tiny, tmp_path, options):
    with pytest.raises(ValueError, match="at least 1"):
        collect(tiny, "layer2", cache_dir=tmp_path, **options)
    assert files(tmp_path) == []
