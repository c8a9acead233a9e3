from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch

from pyrewrite.errors import NonFiniteError
from pyrewrite.statistics import SecondMoment


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """B x d x H x W or N x d -> N x d float64."""
    return x.double() if x.ndim == 2 else x.double().permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def exact(*parts: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([rows_of(x) for x in parts])
    return rows.T @ rows / len(rows)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - expected).norm() <= tolerance * expected.norm())


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def official_file(path, d: int = 5, **members) -> torch.Tensor:
    """Write what the official tool keeps in r2m.npz; returns the float32 sum in it."""
    x = maps(40, d)
    total = (x.T @ x).numpy().astype(np.float32)
    arrays = {
        "constructor": "netdissect.runningstats.RunningSecondMoment()",
        "count": 40,
        "mom2": total,
        "sample_size": np.array(None, dtype=object),  # pickled
        **members,
    }
    np.savez(path, **{name: value for name, value in arrays.items() if value is not ...})
    return torch.from_numpy(total)


@pytest.mark.parametrize(
    "x",
    [
        maps(1, 7),
        maps(129, 7),
        maps(3, 7, 5, 4),
        maps(1, 7, 1, 1),
        maps(3, 7, 5, 4).contiguous(memory_format=torch.channels_last),
        maps(6, 14, 9, 5)[::2, 3:10, 1:6, ::2],
        maps(7, 50).T,
        maps(20, 7).half(),
        maps(2, 7, 4, 4).bfloat16(),
        maps(20, 7).double(),
    ],
    ids=["one", "rows", "maps", "pixel", "channels_last", "sliced", "transposed", "fp16", "bf16", "fp64"],
)
def test_matrix_is_the_mean_of_outer_products(x):
    moment = SecondMoment(7).add(x)
    assert moment.count == len(rows_of(x))
    assert moment.matrix.dtype == torch.float64
    assert torch.equal(moment.matrix, moment.matrix.T)
    assert close(moment.matrix, exact(x))
    assert torch.equal(moment.mean_square, moment.matrix.diagonal())


def test_one_channel_and_nothing_added():
    moment = SecondMoment(1).add(torch.full((3, 1), 2.0))
    assert moment.matrix.tolist() == [[4.0]]
    assert moment.add(torch.empty(0, 1)).add(torch.empty(0, 1, 4, 4)).count == 3


def test_without_keys_there_is_no_matrix():
    for use in (lambda m: m.matrix, lambda m: m.mean_square, lambda m: m.whitener()):
        with pytest.raises(ValueError, match="count is 0"):
            use(SecondMoment(3))


def test_16_bit_keys_are_summed_wide():
    # 4096 + 1 is 4096 in float16: a narrow total would stand still.
    moment = SecondMoment(2)
    moment.add(torch.full((1, 2), 64.0, dtype=torch.float16))
    for _ in range(50):
        moment.add(torch.ones(1, 2, dtype=torch.float16))
    assert moment.total.tolist() == [[4146.0, 4146.0], [4146.0, 4146.0]]


@pytest.mark.parametrize("shape", [(4, 6), (4, 8), (7,), (2, 6, 3), (1, 6, 2, 2), ()])
def test_add_refuses_other_shapes(shape):
    moment = SecondMoment(7)
    with pytest.raises(ValueError, match="N x 7 rows"):
        moment.add(torch.zeros(shape))
    assert moment.count == 0
    assert not moment.total.any()


@pytest.mark.parametrize("d", [0, -1, 2.0, True, "3"])
def test_constructor_refuses(d):
    with pytest.raises(ValueError, match="at least 1"):
        SecondMoment(d)


def test_constructor_refuses_unknown_precision():
    with pytest.raises(ValueError, match="bf16"):
        SecondMoment(3, precision="bf16")


def test_accumulators_are_independent():
    SecondMoment(3).add(torch.ones(5, 3))
    assert SecondMoment(3).count == 0


def test_merge_equals_one_pass():
    a, b = maps(4, 7, 3, 3), maps(11, 7, seed=1)
    left, right = SecondMoment(7).add(a), SecondMoment(7).add(b)
    kept = right.total.clone()
    left.merge(right)
    assert close(left.matrix, exact(a, b))
    assert left.count == 47
    assert torch.equal(right.total, kept)
    with pytest.raises(ValueError, match="6-dimensional"):
        left.merge(SecondMoment(6))


def test_state_dict_round_trip():
    moment = SecondMoment(7).add(maps(9, 7))
    state = moment.state_dict()
    copy = SecondMoment(7).load_state_dict(state)
    moment.add(maps(9, 7))  # the state is a copy
    assert copy.count == 9
    assert close(copy.matrix, exact(maps(9, 7)))
    for wrong in ({}, {**state, "total": torch.zeros(6, 6)}, {**state, "count": torch.tensor(-1)}):
        with pytest.raises(ValueError):
            copy.load_state_dict(wrong)
    assert copy.count == 9


def test_all_reduce_alone():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        moment = SecondMoment(7).add(maps(9, 7)).all_reduce()
    finally:
        torch.distributed.destroy_process_group()
    assert moment.count == 9
    assert close(moment.matrix, exact(maps(9, 7)))


@pytest.mark.slow
def test_all_reduce_over_two_processes(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        from pyrewrite.statistics import SecondMoment
        rank, folder = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        moment = SecondMoment(2).add(torch.full((3 + rank, 2), 1.0 + rank)).all_reduce()
        assert (moment.count, moment.total[0, 0].item()) == (7, 19.0), moment
        dist.destroy_process_group()
        """)
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    results = [(process.communicate(timeout=120)[1], process.returncode) for process in ranks]
    assert all(code == 0 for _, code in results), results


def test_file_round_trip(tmp_path):
    moment = SecondMoment(7).add(maps(9, 7))
    moment.save(tmp_path / "m.npz")
    copy = SecondMoment.load(tmp_path / "m.npz")
    assert torch.equal(copy.total, moment.total)
    assert copy.count == 9
    with np.load(tmp_path / "m.npz") as file:  # the official tool's names
        assert file["count"].dtype == np.int64
        assert file["mom2"].dtype == np.float64
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]


def test_official_file_is_read_without_unpickling(tmp_path):
    total = official_file(tmp_path / "r2m.npz")
    moment = SecondMoment.load(tmp_path / "r2m.npz", d=5)
    assert moment.count == 40
    assert close(moment.total, total.double(), 1e-7)
    assert torch.equal(moment.total, moment.total.T)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"mom2": ...}, "no member 'mom2'"),
        ({"count": ...}, "no member 'count'"),
        ({"count": np.array(-3)}, "count must be"),
        ({"count": np.array([1, 2])}, "count must be"),
        ({"count": np.array(4.5)}, "count must be"),
        ({"mom2": np.zeros((4, 5), np.float32)}, "square"),
        ({"mom2": np.zeros(25, np.float32)}, "square"),
        ({"mom2": np.zeros((0, 0), np.float32)}, "square"),
        ({"mom2": np.zeros((5, 5), np.int64)}, "floating-point"),
        ({"mom2": np.full((5, 5), np.nan)}, "NaN"),
        ({"mom2": np.triu(np.ones((5, 5)))}, "not symmetric"),
        ({"mom2": -np.eye(5)}, "negative"),
        ({"mom2": np.eye(4)}, "length 4, expected 5"),
        ({"mom2": np.array(Bomb(), dtype=object)}, "mom2.*cannot be read"),
        ({"count": np.array(Bomb(), dtype=object)}, "count.*cannot be read"),
    ],
)
def test_foreign_files_are_refused_by_name(tmp_path, monkeypatch, members, message):
    monkeypatch.chdir(tmp_path)
    official_file("r2m.npz", **members)
    with pytest.raises(ValueError, match=rf"(?s)r2m\.npz.*{message}"):
        SecondMoment.load("r2m.npz", d=5)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n" + bytes(50), pickle.dumps([1, 2])])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz"):
        SecondMoment.load(tmp_path / "x.npz")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "m.npz"
    SecondMoment(7).add(maps(9, 7)).save(path)
    whole = path.read_bytes()
    for cut in (len(whole) // 3, len(whole) - 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"m\.npz"):
            SecondMoment.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.npy", "no array")
    with pytest.raises(ValueError, match="no member"):
        SecondMoment.load(path)
    np.save(tmp_path / "one.npy", np.eye(3))
    with pytest.raises(ValueError, match="single array"):
        SecondMoment.load(tmp_path / "one.npy")
    with pytest.raises(FileNotFoundError):
        SecondMoment.load(tmp_path / "none.npz")


def test_nan_keys_end_in_an_error_that_names_the_moment():
    x = maps(9, 3)
    x[4, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="second moment holds NaN"):
        SecondMoment(3).add(x).whitener()


def test_powers_are_kept_until_the_sum_changes():
    moment = SecondMoment(6).add(torch.randn(50, 6))
    first = moment.whitener(0.1)
    first.zero_()  # a copy: what the caller does to it is the caller's affair
    again = moment.whitener(0.1)
    assert again.abs().sum() > 0
    assert not torch.equal(again, moment.whitener(0.2))
    moment.add(torch.randn(50, 6))
    assert not torch.equal(again, moment.whitener(0.1))
    fresh = SecondMoment(6)
    fresh.load_state_dict(moment.state_dict())
    assert torch.equal(fresh.whitener(0.1), moment.whitener(0.1))
    moment.total.mul_(2)
    torch.testing.assert_close(moment.whitener(0.0), fresh.whitener(0.0) / 2**0.5)
