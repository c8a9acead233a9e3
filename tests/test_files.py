from __future__ import annotations

import os
import stat

import pytest

from pyrewrite._files import write_atomically


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_bytes_text_and_functions(tmp_path):
    write_atomically(tmp_path / "a", b"\0\1")
    write_atomically(str(tmp_path / "b"), "é")
    assert write_atomically(tmp_path / "c", lambda file: file.write(b"x")) == tmp_path / "c"
    write_atomically(tmp_path / "c", b"")
    assert [(tmp_path / n).read_bytes() for n in "abc"] == [b"\0\1", "é".encode(), b""]
    assert names(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_old_file_stays_when_writing_fails(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_readable_as_any_file(tmp_path):
    write_atomically(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == stat.S_IMODE(os.stat(tmp_path / "b").st_mode)


def test_long_names_links_folders_and_devices(tmp_path):
    write_atomically(tmp_path / ("n" * 250), b"x")
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, b"x")
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        write_atomically(tmp_path / "none" / "a", b"x")
    write_atomically(os.devnull, b"x")
    assert not os.path.isfile(os.devnull)
