"""Writing a generator, edits included: in the format that its family's files have, or as safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from pyrewrite._files import write_atomically
from pyrewrite._finite import all_finite
from pyrewrite.errors import NonFiniteError
from pyrewrite.generators.base import Generator
from pyrewrite.generators.loading._safetensors_file import FORMAT, VERSION


def save_generator(generator: Generator, path: str | os.PathLike) -> Path:
    """Write the weights as they are now, active patches merged, float32, whole or not at all.

    A path that ends in .safetensors: the names of the family's files, and metadata (format, version, family, hash).
    Any other: a torch checkpoint. StyleGAN2: `{g_ema, latent_avg}` with the rosinality names. Progressive GAN:
    `{state_dict}` with the official names. DCGAN: the state dict of the PyTorch tutorial. StyleGAN3: `{G_ema}`, a state
    dict with NVIDIA's names, and the settings of its layers beside it.
    All load again with `load_generator`, and the torch checkpoints in the tools the formats come from.

    NonFiniteError when a weight is NaN or infinite; ValueError for a StyleGAN2 with class labels or of another
    architecture than "skip" in a torch checkpoint, for which the rosinality format has no place; FileNotFoundError when
    the folder is not there.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in generator.file_state().items():
        if not all_finite(tensor):
            raise NonFiniteError(f"{name} holds NaN or infinity: refusing to write it to {path}")
        state[name] = tensor.cpu().contiguous().clone()  # each on its own: views of one memory are refused on reading
    if Path(path).suffix.lower() == ".safetensors":
        return write_atomically(path, lambda file: file.write(_safetensors(generator, state)))
    if generator.classes and generator.family == "stylegan2":
        raise ValueError(
            f"{path}: a generator with {generator.classes} class labels has no place in a rosinality checkpoint; "
            "write it to a .safetensors file"
        )
    if generator.family == "stylegan2" and generator.architecture != "skip":
        raise ValueError(
            f"{path}: a StyleGAN2 of the architecture {generator.architecture!r} has no place in a rosinality "
            "checkpoint; write it to a .safetensors file"
        )
    if generator.family == "stylegan2":
        mean = state.pop("latent_avg")
        content = {"g_ema": state, "latent_avg": mean, **generator.file_settings()}
    elif generator.family == "progan":
        content = {"state_dict": state}
    elif generator.family == "stylegan3":
        content = {"G_ema": state, **generator.file_settings()}
    else:
        content = state
    return write_atomically(path, lambda file: torch.save(content, file))


def _safetensors(generator: Generator, state: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "family": generator.family,
        "hash": generator.weights_hash(),
    }
    if settings := generator.file_settings():
        metadata["settings"] = json.dumps(settings)
    return save(state, metadata)
