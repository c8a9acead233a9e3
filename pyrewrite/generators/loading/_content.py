"""What a file is, judged by its first bytes: extensions are renamed too often to be believed."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from pyrewrite.errors import CheckpointError, DamagedCheckpointError, NotACheckpointError

_ZIP = b"PK\x03\x04"
# torch.save before 1.6 begins with a pickled magic number (protocol 2, LONG1 of ten bytes).
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa8501a")[:-1]
_EXPECTED = (
    "expected a generator: a torch checkpoint, a safetensors file, or a pickle of NVIDIA's StyleGAN2 or StyleGAN3"
)

_SIGNATURES = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x7fELF", "a program"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was never downloaded (git lfs pull)"),
)


def checkpoint_kind(path: Path) -> str:
    """ "torch", "pickle" or "safetensors": what the file is as far as its outer layout says, and whole.

    Raises FileNotFoundError, IsADirectoryError, NotACheckpointError (which names what the file is) or
    DamagedCheckpointError (with sizes).
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; {_EXPECTED}")
    if not path.is_file():  # a pipe would be waited for
        raise NotACheckpointError(f"{str(path)!r} is a device or a pipe; {_EXPECTED}")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        raise NotACheckpointError(f"{str(path)!r} is empty (0 bytes); {_EXPECTED}")
    if head.startswith(_ZIP):
        _require_whole_archive(path, size)
        return "torch"
    if head.startswith(_LEGACY):
        return "torch"
    if _LEGACY.startswith(head):
        raise DamagedCheckpointError(
            f"{str(path)!r} is truncated: {size} bytes, which is less than a torch file's header"
        )
    # A length of eight bytes, then a JSON text.
    if head[8:9] == b"{" and not (head.startswith(b"{") and b"\0" not in head[:8]):
        return "safetensors"
    if head[:1] == b"\x80" and 2 <= head[1] <= 5:
        return "pickle"
    raise NotACheckpointError(f"{str(path)!r} ({size} bytes) is {_described(head)}; {_EXPECTED}")


def _described(head: bytes) -> str:
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP picture"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if not head.strip(b"\x00"):
        return "nothing but zero bytes: damaged, or a download that was never finished"
    try:
        text = head[:4000].decode("utf-8-sig", "strict" if len(head) < 4000 else "ignore").lstrip().lower()
    except UnicodeDecodeError:
        return f"of an unknown kind (it begins with {head[:8].hex(' ')})"
    if text.startswith("<") and re.search(r"<(!doctype html|html|head|body)\b", text):
        return "a web page, perhaps in place of a download"
    if text.startswith("<?xml"):
        return "an XML text, perhaps a server's error in place of a download"
    if "\x00" in text:
        return f"of an unknown kind (it begins with {head[:8].hex(' ')})"
    return "a JSON text" if text.startswith(("{", "[")) else "a text file"


def _require_whole_archive(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/code/") or "/code/" in name or name.endswith("/constants.pkl") for name in names):
                raise NotACheckpointError(
                    f"{str(path)!r} is a TorchScript archive, a program with weights; {_EXPECTED}"
                )
            _refuse_tricks(path, archive, size)
            if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
                kind = (
                    "a NumPy archive (.npz)"
                    if names and all(name.endswith(".npy") for name in names)
                    else "a zip archive"
                )
                raise NotACheckpointError(f"{str(path)!r} is {kind} without a checkpoint in it; {_EXPECTED}")
            bad = _damaged_records(archive)
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamagedCheckpointError(
            f"{str(path)!r} is truncated or damaged: {size} bytes, {_first_incomplete_record(path, size)}"
        ) from error
    # torch can be told not to compute checksums; then none of them is right, and none says anything.
    if bad and len(bad) < len(names):
        records = ", ".join(bad[:3]) + (" ..." if len(bad) > 3 else "")
        raise DamagedCheckpointError(
            f"{str(path)!r} is damaged: {size} bytes, {len(bad)} of {len(names)} records unreadable or with a wrong "
            f"checksum ({records})"
        )


def _refuse_tricks(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Raise CheckpointError for an archive that no torch writes: names out of its folder, twice, records that swell."""
    names = archive.namelist()
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise CheckpointError(f"{str(path)!r} is a zip archive with a record {name!r}, which lies outside of it")
    # Without regard to case, as torch looks records up.
    twice = sorted(name for name, count in Counter(map(str.casefold, names)).items() if count > 1)
    if twice:
        raise CheckpointError(f"{str(path)!r} is a zip archive with two records {twice[0]!r}")
    pickles = [name for name in names if name.casefold().rsplit("/", 1)[-1] == "data.pkl"]
    if len(pickles) > 1:
        raise CheckpointError(f"{str(path)!r} is a zip archive with several contents: {', '.join(pickles[:4])}")
    # torch stores without compression. A repacked file may be compressed, but trained weights hardly are compressible.
    unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > 4 * size + (1 << 20):
        raise CheckpointError(
            f"{str(path)!r} is a zip archive of {size} bytes whose records declare {unpacked}: no checkpoint swells so"
        )


def _damaged_records(archive: zipfile.ZipFile) -> list[str]:
    bad = []
    for info in archive.infolist():
        try:
            with archive.open(info) as record:
                while record.read(1 << 20):
                    pass
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError):
            # A header that is not as torch writes it asks for a password, another compression, another place ...
            bad.append(f"{info.filename}, {info.file_size} bytes")
    return bad


def _first_incomplete_record(path: Path, size: int) -> str:
    """Where a truncated archive ends, from the headers that precede each record."""
    offset, count = 0, 0
    with path.open("rb") as file:
        while True:
            file.seek(offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != _ZIP:
                return f"its table of contents is missing after {count} whole records"
            packed = int.from_bytes(header[18:22], "little")
            name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
            name = file.read(name_length).decode("utf-8", "replace")
            end = offset + 30 + name_length + extra_length + packed
            if end > size:
                return f"where its record {count + 1} ({name}) alone needs {end}"
            # Flag bit 3: the sizes follow the record in a descriptor.
            offset, count = end + (16 if header[6] & 8 else 0), count + 1
