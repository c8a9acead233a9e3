from __future__ import annotations

import resource
import time

import pytest
import torch

from pyrewrite.errors import CheckpointError
from pyrewrite.generators import load_generator


@pytest.fixture(autouse=True)
def _one_thread():
    """Small maps: a second thread that waits for its turn on a busy machine costs minutes here, and gains nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- files made to do harm ---------------------------------------------------------------------------------------------

SECONDS = 20  # far above what any of these files takes; a bomb that goes off takes minutes, or for ever
MEGABYTES = 300


@pytest.fixture
def bounds():
    """Memory and time of a test about hostile files."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


@pytest.fixture
def sentinel(tmp_path):
    """A file that would be there if anything had run."""
    path = tmp_path / "sentinel"
    yield path
    assert not path.exists()


@pytest.fixture
def refused(tmp_path, sentinel):
    """Writes bytes to a file and expects a CheckpointError about them that matches."""

    def check(data, match, name="network.pkl"):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=match) as caught:
            load_generator(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 2000
        assert not sentinel.exists()

    return check
