"""A session on a generator whose maps reach beyond the picture, and on one that is not at its defaults."""

from __future__ import annotations

import json

import nvidia_reference
import pytest
import stylegan3_reference
import torch
from interface_session_support import Client, Refused, box

from pyrewrite import load_generator
from pyrewrite.interface import Session


def select(client: Client, mask: bytes) -> None:
    client.do("paint", mask, image=0)
    client.do("copy")
    client.do("paint", mask, image=1)
    client.do("paste")


def test_the_object_lands_on_the_picture_and_not_on_the_margin(tmp_path):
    state, settings = stylegan3_reference.random_state()
    torch.save({"G_ema": state, **settings}, tmp_path / "x.pt")
    session = Session(load_generator(tmp_path / "x.pt"), layer="layer4", samples=8, cache_dir=False, strip="0-3")
    client = Client(session)
    select(client, box(4, 6, 10, 12, size=16))  # the map has 8 pixels of picture and 5 around it
    landed = client.state["paste"]["box"]
    assert all(abs(found - wanted) <= 2 for found, wanted in zip(landed, (4, 6, 10, 12), strict=True))
    session.close()


def test_records_say_how_their_pictures_are_made(tmp_path):
    torch.save(nvidia_reference.random_state(classes=3, channels=(8, 8, 8)), tmp_path / "x.pt")
    generator = load_generator(tmp_path / "x.pt")
    generator.apply_settings({"label": 2, "noise": "none"})
    session = Session(generator, layer="layer4", samples=8, cache_dir=False, strip="0-3")
    client = Client(session)
    select(client, box(2, 2, 12, 12, size=16))
    _, (data,) = client.answer(client.send("do", "download", kind="edit"))
    assert json.loads(data)["pyrewrite"]["images"] == {"label": 2, "noise": "none"}
    client.do("upload", data, kind="edit", name="x.json")
    generator.apply_settings({})
    with pytest.raises(Refused, match=r"made with .*'noise': 'none'.*other pictures"):
        client.do("upload", data, kind="edit", name="x.json")
    session.close()
