"""What the pictures of the bundled generators show by design: the attributes that a latent stands for.

Both demo generators were fitted to (latent, drawing) pairs, where every attribute of the drawing is read off one or two
coordinates of the latent. So the truth about every picture is known without looking at it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Names of the Open Peeps artwork (CC0). "noHair1" is drawn twice as often as each other head.
HEADS = (
    *("noHair1", "noHair1", "noHair2", "noHair3", "afro", "bangs", "bun", "dreads1"),
    *("flatTop", "grayBun", "grayShort", "long", "longCurly", "medium1", "mohawk", "pomp"),
)
HATS = ("hatBeanie", "hatHip", "turban")
GLASSES = ("sunglasses", "sunglasses2", "glasses3", "glasses4")
BEARDS = ("full2", "full3", "goatee2", "moustache2")
FACES = {
    1: ("calm", "smileBig", "smileTeethGap", "smile"),
    0: ("serious", "driven", "blank", "contempt"),
    -1: ("solemn", "veryAngry", "concerned", "rage"),
}
SKINS, CLOTHS, CONTRASTS = 5, 6, 6

_BALD_HEADS = 4  # the first four of HEADS
_PROGAN_HEADS = (0, 8, 4, 11)  # bald, flat top, afro, long
_FAMILIES = {"stylegan2": 128, "peeps": 128, "progan": 32, "peeps-progan": 32}


def peeps_attributes(z: Tensor, family: str = "stylegan2") -> dict[str, Tensor]:
    """The attributes that latents of a bundled generator stand for.

    z: B x 128 (family "stylegan2" or "peeps") or B x 32 ("progan", "peeps-progan"); truncation has no part in it.

    Returns tensors of B: `hat`, `glasses`, `beard`, `bald` (bool); `mood` (-1 frown, 0, 1 smile); `head`, `hat_kind`,
    `glasses_kind`, `beard_kind`, indices into HEADS, HATS, GLASSES, BEARDS and -1 where there is none (a head under a
    hat is none); `face` (index into FACES[mood]), `skin`, `cloth`, `contrast` (colour numbers), all int64; `hue` and
    `lightness` of the background in [0, 1], float32. bald: no hat, and a head without hair or with next to none.

    ValueError for another family or length.
    """
    if family not in _FAMILIES:
        raise ValueError(f"no truth is known for the family {family!r}; known are {', '.join(_FAMILIES)}")
    if z.ndim == 4 and z.shape[2:] == (1, 1):
        z = z[:, :, 0, 0]
    if z.ndim != 2 or z.shape[1] != _FAMILIES[family]:
        raise ValueError(f"latents of {family} are B x {_FAMILIES[family]}, got {tuple(z.shape)}")
    z = z.detach().to("cpu", torch.float32)
    z = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
    u = 0.5 * (1 + torch.erf(z / math.sqrt(2)))  # B x z, uniform in (0, 1)
    return _stylegan2(z, u) if _FAMILIES[family] == 128 else _progan(z, u)


def _cell(u: Tensor, column: int, cells: int) -> Tensor:
    """Which of equally probable cells a coordinate falls into: B int64."""
    return (u[:, column] * cells).floor().clamp(0, cells - 1).long()


def _hue(z: Tensor) -> Tensor:
    return torch.atan2(z[:, 5], z[:, 4]) / (2 * math.pi) % 1.0


def _stylegan2(z: Tensor, u: Tensor) -> dict[str, Tensor]:
    hat, glasses, beard = u[:, 0] > 0.8, u[:, 1] > 0.75, u[:, 2] > 0.85
    return _assemble(
        hat,
        glasses,
        beard,
        head=_cell(u, 7, 4) * 4 + _cell(u, 8, 4),
        hat_kind=_cell(u, 9, 3),
        glasses_kind=_cell(u, 11, 4),
        beard_kind=_cell(u, 12, 4),
        mood=_cell(u, 3, 3) - 1,
        face=_cell(u, 10, 4),
        skin=_cell(u, 13, 5),
        cloth=_cell(u, 14, 3) * 2 + _cell(u, 15, 2),
        contrast=_cell(u, 16, 3) * 2 + _cell(u, 17, 2),
        hue=_hue(z),
        lightness=u[:, 6],
    )


def _progan(z: Tensor, u: Tensor) -> dict[str, Tensor]:
    # One kind of each: the drawings it was fitted to were a simpler set.
    mood = 2 * _cell(u, 3, 2) - 1
    return _assemble(
        u[:, 0] > 0.7,
        u[:, 1] > 0.7,
        u[:, 2] > 0.7,
        head=torch.tensor(_PROGAN_HEADS)[_cell(u, 7, 4)],
        hat_kind=torch.zeros_like(mood),
        glasses_kind=torch.zeros_like(mood),
        beard_kind=torch.zeros_like(mood),
        mood=mood,
        face=(mood > 0).long(),
        skin=_cell(u, 8, 5),
        cloth=_cell(u, 9, 3) * 2 + _cell(u, 10, 2),
        contrast=torch.zeros_like(mood),
        hue=_hue(z),
        lightness=u[:, 6],
    )


def _assemble(hat: Tensor, glasses: Tensor, beard: Tensor, **rest: Tensor) -> dict[str, Tensor]:
    none = torch.tensor(-1)
    rest["head"] = torch.where(hat, none, rest["head"])
    for kind, worn in (("hat_kind", hat), ("glasses_kind", glasses), ("beard_kind", beard)):
        rest[kind] = torch.where(worn, rest[kind], none)
    bald = (rest["head"] >= 0) & (rest["head"] < _BALD_HEADS)
    return {"hat": hat, "glasses": glasses, "beard": beard, "bald": bald, **rest}
