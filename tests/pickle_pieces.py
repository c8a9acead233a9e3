"""The pieces of pickles, by hand: what no honest writer would write."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def stored(data):
    return b"B" + struct.pack("<I", len(data)) + data


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def dotted(module, attribute):
    return text(module) + text(attribute) + b"\x93"


def pickled(body):
    return b"\x80\x04" + body + b"."


def call(function, *args):
    return function + b"(" + b"".join(args) + b"tR"


def storage_bytes(numbers=4):
    return legacy(claim(numbers), data=struct.pack("<q", numbers) + bytes(4 * numbers))


KEYS = b"]" + text("1") + b"a"
FOUR_NUMBERS = struct.pack("<q", 4) + bytes(16)


def legacy(body, keys=KEYS, data=FOUR_NUMBERS):
    """A torch file as before 1.6, with `body` for its content."""
    head = [pickle.dumps(number, 2) for number in (0x1950A86A20F9469CFC6C, 1001)]
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    return b"".join([*head, system, b"\x80\x02" + body + b".", b"\x80\x02" + keys + b".", data])


def claim(count=4, kind="FloatStorage", module="torch"):
    size = b"J" + struct.pack("<i", count) if count < 2**31 else b"\x8a\x08" + struct.pack("<q", count)
    return b"(" + text("storage") + name(module, kind) + text("1") + text("cpu") + size + b"NtQ"


def number(value):
    return b"J" + struct.pack("<i", value)


def long(value):
    data = value.to_bytes(11, "little", signed=True)
    return b"\x8a\x0b" + data


def torch_archive(body, records=(), protocol=2):
    """A torch file whose content is made of `body`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("x/data.pkl", bytes([0x80, protocol]) + body + b".")
        new.writestr("x/version", b"3\n")
        for record, data in records:
            new.writestr(f"x/{record}", data)
    return file.getvalue()
