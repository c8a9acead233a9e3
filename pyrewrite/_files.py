"""Writing files so that a reader, now or after a crash, sees the old file or the new one and never a part of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike, content: bytes | str | Callable[[BinaryIO], object]) -> Path:
    """Write `content` to `path`: first to a hidden name beside it, then moved over it.

    content: bytes, text (written as UTF-8), or a function that writes to the binary file it is given
    (``lambda f: np.savez(f, ...)``, ``lambda f: image.save(f, "PNG")``).

    The folder must exist. Whatever fails (the function, a full disk, Ctrl-C), the old file is as it was and
    nothing is left beside it. A link is followed; a device such as /dev/null is written directly.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        if target.is_dir():
            raise IsADirectoryError(f"{path} is a folder, a file name is expected")
        with open(target, "wb") as file:
            _write(file, content)
        return path
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {target.parent} does not exist")
    # Not tempfile: its files are private (mode 600) and would stay so after the move.
    temporary = target.with_name(f".{target.name[:80]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            _write(file, content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _write(file: BinaryIO, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)
