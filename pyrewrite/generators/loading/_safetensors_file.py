"""Reading safetensors files: a length, a JSON text with names, types, shapes and places, then the numbers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyrewrite.errors import CheckpointError, DamagedCheckpointError

MAX_HEADER = 4 << 20  # bytes; that of the largest published StyleGAN is 30,000. The format allows 100 MB
MAX_TENSORS = 20_000
FORMAT = "pyrewrite-generator"  # metadata "format" of files that save_generator wrote
VERSION = 1


class _TwiceError(Exception):
    """A name that stands twice, of which readers take one or the other."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def header_problem(path: Path, size: int) -> str | None:
    """What is wrong with the header of a safetensors file, in words; None if nothing is."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length >= 1 << 63:
            return f"its header declares a negative length, {length - (1 << 64)}"
        if length > MAX_HEADER:
            return f"its header declares {length} bytes, at most {MAX_HEADER} are read"
        if size < 8 + length:
            return f"truncated: its header declares {length} bytes, {max(size - 8, 0)} follow"
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_each_once)
    except _TwiceError as error:
        return f"its header holds {str(error)[:80]!r} twice"
    except (ValueError, RecursionError) as error:
        return f"its header is not a JSON text: {error}"
    if not isinstance(header, dict):
        return f"its header is a {type(header).__name__}, expected names"
    if len(header) > MAX_TENSORS:
        return f"its header holds {len(header)} names, at most {MAX_TENSORS} are read"
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        places = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(places, list) or len(places) != 2 or any(type(n) is not int or n < 0 for n in places):
            return f"the entry {name!r} of its header has no place in the file"
        end = max(end, *places)
    if size != 8 + length + end:
        return f"truncated or damaged: its header declares {8 + length + end} bytes"
    return None


def file_settings(path: Path, metadata: dict[str, str]) -> dict[str, float]:
    """The settings that `save_generator` wrote beside the weights: name -> number. Others' metadata has none."""
    if metadata.get("format") != FORMAT or "settings" not in metadata:
        return {}
    try:
        settings = json.loads(metadata["settings"])
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{str(path)!r} has settings that are not a JSON text: {error}") from error
    if not isinstance(settings, dict) or not all(type(value) in (int, float) for value in settings.values()):
        raise DamagedCheckpointError(f"{str(path)!r} has settings that are not names and numbers")
    return settings


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata. Raises DamagedCheckpointError, or CheckpointError for a newer pyrewrite's file."""
    size = path.stat().st_size
    if problem := header_problem(path, size):
        raise DamagedCheckpointError(f"{str(path)!r} is a safetensors file of {size} bytes, and {problem}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise DamagedCheckpointError(f"{str(path)!r} is a damaged safetensors file ({size} bytes): {error}") from error
    if metadata.get("format") == FORMAT and metadata.get("version") != str(VERSION):
        raise CheckpointError(
            f"{str(path)!r} was written by another pyrewrite: version {metadata.get('version')!r} of the format, "
            f"{VERSION} is read here"
        )
    return tensors, metadata
