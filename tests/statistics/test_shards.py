"""Statistics by several processes: the same result, nothing counted twice or lost, nothing done again after a crash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyrewrite.errors import NonFiniteError
from pyrewrite.statistics import collect, collect_shared, shards


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of this process alone, and shards of 4 images."""
    monkeypatch.setattr(shards, "SHARD", 4)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield tmp_path / "cache"
    torch.distributed.destroy_process_group()


def stop_after(images: int):
    def progress(done: int, total: int) -> None:
        if done == images:
            raise KeyboardInterrupt

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(processes, tmp_path):
    command = ["-m", "pyrewrite", "stats", "peeps-progan", "layer4", "--samples", "150", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(start: list[str], name: str) -> tuple[dict, np.lib.npyio.NpzFile]:
        done = subprocess.run(
            [sys.executable, *start, *command, "--cache", str(tmp_path / name), "--out", str(tmp_path / f"{name}.npz")],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), np.load(tmp_path / f"{name}.npz")

    data, one = run([], "one")
    shared, several = run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)], "several"
    )
    assert data["count"] == shared["count"] == several["count"] == 150 * 8 * 8
    difference = np.linalg.norm(several["mom2"] - one["mom2"]) / np.linalg.norm(one["mom2"])
    assert difference < 1e-12
    # the shards are gone, the cache file is the one that a single process finds
    (left,) = (tmp_path / "several").iterdir()
    shutil.copy(left, tmp_path / "one" / left.name)
    again, _ = run([], "one")
    assert again["from_cache"] is True


def test_a_killed_run_goes_on(alone, tiny):
    with pytest.raises(KeyboardInterrupt):
        collect_shared(tiny, "layer2", samples=10, cache_dir=alone, progress=stop_after(8))
    assert tiny.runs == [4, 4]
    assert len(list(alone.rglob("*.npz"))) == 2
    found = collect_shared(tiny, "layer2", samples=10, cache_dir=alone)
    assert tiny.runs == [4, 4, 2]
    expected = collect(tiny, "layer2", samples=10, cache_dir=False)
    assert found.moment.count == expected.moment.count == 10 * 25
    assert torch.allclose(found.moment.total, expected.moment.total, rtol=1e-6)
    assert [p.suffix for p in alone.iterdir()] == [".npz"]
    again = collect_shared(tiny, "layer2", samples=10, cache_dir=alone)
    assert again.from_cache
    assert torch.equal(again.moment.total, found.moment.total)


def test_a_shard_in_the_place_of_another_is_computed_again(alone, tiny):
    with pytest.raises(KeyboardInterrupt):
        collect_shared(tiny, "layer2", samples=12, cache_dir=alone, progress=stop_after(8))
    (folder,) = alone.iterdir()
    shutil.copy(folder / "0-4.npz", folder / "4-8.npz")
    (folder / "0-4.npz").write_bytes(b"PK\x03\x04 cut off")
    tiny.runs.clear()
    with pytest.warns(RuntimeWarning, match="shard not used") as caught:
        found = collect_shared(tiny, "layer2", samples=12, cache_dir=alone)
    assert len(caught) == 2
    assert tiny.runs == [4, 4, 4]
    expected = collect(tiny, "layer2", samples=12, cache_dir=False)
    assert torch.allclose(found.moment.total, expected.moment.total, rtol=1e-6)


def test_without_a_cache_folder(alone, tiny):
    assert collect_shared(tiny, "layer2", samples=5, cache_dir=False).moment.count == 5 * 25
    assert not alone.exists()
    alone.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="could not be kept"):
        assert collect_shared(tiny, "layer2", samples=5, cache_dir=alone).moment.count == 5 * 25


def test_an_error_reaches_every_process(alone, tiny, monkeypatch):
    tiny.poison = {5}
    with pytest.raises(NonFiniteError, match="image 5"):
        collect_shared(tiny, "layer2", samples=10, cache_dir=False)
    gathered = shards._gathered

    def with_another(value, group):
        """As if a second process had failed."""
        return (
            [*gathered(value, group), ([], "NonFiniteError: image 7")]
            if type(value) is tuple
            else gathered(value, group)
        )

    tiny.poison = set()
    monkeypatch.setattr(shards, "_gathered", with_another)
    with pytest.raises(RuntimeError, match="process 1 failed: NonFiniteError: image 7"):
        collect_shared(tiny, "layer2", samples=10, cache_dir=False)


def test_only_missing_shards_are_shared_out():
    every = [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    assert shards._shares([set(), set()], every) == [[(0, 4), (8, 12), (16, 20)], [(4, 8), (12, 16)]]
    # the first process has finished all of its own: the rest is for both
    parts = shards._shares([{(0, 4), (8, 12), (16, 20)}, set()], every)
    assert parts == [[(0, 4), (4, 8), (8, 12), (16, 20)], [(12, 16)]]
    for seen in ([set(every), set(every)], [set(every), set()], [set()] * 3):
        assert sorted(s for part in shards._shares(seen, every) for s in part) == every


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        ([(0, 4, 100)], "images 4 to 5 were counted 0 times"),
        ([(0, 4, 100), (4, 6, 50), (0, 4, 100)], "images 0 to 3 were counted 2 times"),
        ([(0, 4, 100), (4, 6, 49)], "images 4 to 5: 49 keys were counted, expected 50"),
    ],
)
def test_lost_and_doubled_shards_are_noticed(counted, message):
    with pytest.raises(RuntimeError, match=message):
        shards._require_each_once([(0, 4), (4, 6)], counted, 25)
    shards._require_each_once([(0, 4), (4, 6)], [(4, 6, 50), (0, 4, 100)], 25)
