from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch


class TinyGenerator:
    """What statistics need of a generator: one layer of `d` channels, 5 x 5 pixels, whose keys are a matrix times z."""

    def __init__(self, d: int = 6, seed: int = 0) -> None:
        self.layers = {
            "layer2": SimpleNamespace(in_channels=d, out_channels=d, key_resolution=5, key_pixels=25, resolution=5)
        }
        self.weight = torch.randn(d * 25, 4, generator=torch.Generator().manual_seed(seed))
        self.truncation, self.device = 1.0, torch.device("cpu")
        self.runs: list[int] = []  # batch sizes of all calls of `keys`
        self.poison: set[int] = set()  # images whose keys hold a NaN
        self.memory = 10**9  # images that fit at a time

    def latents(self, numbers, seed=1):
        numbers = list(numbers)
        rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(seed))
        self.numbers = {tuple(rows[n].tolist()): n for n in numbers}
        return rows[numbers]

    def keys(self, layer, z):
        self.runs.append(len(z))
        if len(z) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        keys = (z @ self.weight.T).reshape(len(z), -1, 5, 5) * self.truncation  # B x d x 5 x 5
        for i, row in enumerate(z):
            if self.numbers[tuple(row.tolist())] in self.poison:
                keys[i, 1, 2, 3] = float("nan")
        return keys

    def weights_hash(self):
        return hashlib.sha256(self.weight.numpy().tobytes()).hexdigest()


@pytest.fixture
def tiny():
    return TinyGenerator()
