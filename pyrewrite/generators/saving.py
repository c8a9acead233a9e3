"""Writing a generator, edits included, in the format that its family's files have."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from pyrewrite._files import write_atomically
from pyrewrite.errors import NonFiniteError
from pyrewrite.generators.base import Generator


def save_generator(generator: Generator, path: str | os.PathLike) -> Path:
    """Write the weights as they are now, active patches merged, float32, whole or not at all.

    StyleGAN2: `{g_ema, latent_avg}` with the rosinality names. Progressive GAN: `{state_dict}` with the official names.
    Both load again with `load_generator`, and in the tools the formats come from.
    NonFiniteError when a weight is NaN or infinite; FileNotFoundError when the folder is not there.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in generator.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name} holds NaN or infinity: refusing to write it to {path}")
        state[name] = tensor.detach().cpu().contiguous().clone()
    if generator.family == "stylegan2":
        mean = state.pop("latent_avg")
        content = {"g_ema": state, "latent_avg": mean}
    else:
        content = {"state_dict": state}
    return write_atomically(path, lambda file: torch.save(content, file))
