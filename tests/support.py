"""What test files share."""

from __future__ import annotations

import numpy as np

from pyrewrite.rewriting import encode_mask


def mask_url(size: int, top: int, left: int, bottom: int, right: int) -> str:
    """A painted box on a size x size picture, as a data URL."""
    mask = np.zeros((size, size))
    mask[top:bottom, left:right] = 1
    return encode_mask(mask)


def bits(generator) -> dict:
    return {name: tensor.clone() for name, tensor in generator.state_dict().items()}


def same_bits(generator, kept: dict) -> bool:
    state = generator.state_dict()
    return all(state[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in kept.items())


def settled(session):
    """The generator of an interface's session once nothing is left to do: a preview applies a patch to render."""
    assert session.settle()
    return session.model.generator
