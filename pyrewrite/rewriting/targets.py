"""From selections to insertion targets: the object's values pasted into other images' values, with the keys there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from .._memory import is_out_of_memory, lowered
from ..edit import Place, Selection
from ..errors import EditError, NonFiniteError
from ..generators import Activation, Generator
from ..generators.network import EditableNetwork
from ..ops import ConvLayer, InsertionTarget, crop_key, layer_values
from .selection import Box, align, bounding_box, grow, mask_on_map, place

CAPTURE_BATCH = 8  # at most; more gain nothing, and a job is stopped between batches


@dataclass(frozen=True)
class Captured:
    """Keys, values and styles of some numbered images at one layer.

    key: B x I x h x w. value: B x O x H x W. style: B x I or None. noise: H x W or None. index: image number -> row.
    margin, key_margin: pixels of the value map and of the key map around the picture, on every side.
    """

    key: Tensor
    value: Tensor
    style: Tensor | None
    noise: Tensor | None
    index: dict[int, int]
    margin: int = 0
    key_margin: int = 0

    @property
    def key_size(self) -> tuple[int, int]:
        return self.key.shape[2], self.key.shape[3]

    @property
    def value_size(self) -> tuple[int, int]:
        return self.value.shape[2], self.value.shape[3]


def activations(
    generator: Generator, layer: str, numbers: Iterable[int], seed: int, latents: Mapping[int, Tensor] | None = None
) -> list[Activation]:
    """The numbered images run up to the layer, in batches, in their order.

    latents: image number -> w, for pictures that the generator's numbers do not reach (StyleGAN2 and StyleGAN3 only).
    """
    latents = latents or {}
    parts: list[Activation] = []
    at_once = capture_batch(generator)
    with torch.no_grad():
        for brought, run in _runs(list(numbers), latents):
            if brought:
                parts += [_capture_w(generator, layer, latents[n]) for n in run]
                continue
            first = 0
            while first < len(run):
                batch, short = run[first : first + at_once], False
                try:
                    parts.append(generator.capture(layer, generator.latents(batch, seed)))
                    first += len(batch)
                except (RuntimeError, MemoryError) as error:
                    if len(batch) == 1 or not is_out_of_memory(error):
                        raise
                    short = True
                if short:  # outside of the handler, which keeps what the failed batch held
                    at_once = lowered(len(batch), generator.device, layer)
    return parts


def capture_batch(generator: EditableNetwork) -> int:
    """How many images to capture at once."""
    return min(CAPTURE_BATCH, generator.batch_size())


def _runs(numbers: Sequence[int], latents: Mapping[int, Tensor]) -> list[tuple[bool, list[int]]]:
    """Numbers in a row that are brought pictures, or are not."""
    return [(brought, list(run)) for brought, run in groupby(numbers, key=lambda n: n in latents)]


def _capture_w(generator: Generator, layer: str, w: Tensor) -> Activation:
    if not hasattr(generator, "capture_w"):
        raise EditError(f"pictures from w need a StyleGAN2 or StyleGAN3; this is a {generator.family}")
    try:
        return generator.capture_w(layer, w[None])
    except ValueError as error:
        raise EditError(f"field 'pyrewrite.latents': {error}") from error


def captured_from(layer: str, numbers: Sequence[int], parts: Sequence[Activation]) -> Captured:
    """Activations of the numbered images, joined. NonFiniteError names layer and images with NaN or infinity."""
    key = torch.cat([p.key for p in parts])  # B x I x h x w
    value = torch.cat([p.value for p in parts])  # B x O x H x W
    finite = torch.isfinite(key).flatten(1).all(1) & torch.isfinite(value).flatten(1).all(1)  # B
    if not finite.all():
        bad = [n for n, good in zip(numbers, finite.tolist(), strict=True) if not good]
        raise NonFiniteError(f"{layer}: the activations of image {', '.join(map(str, bad[:8]))} are not finite")
    style = torch.cat([p.style for p in parts]) if parts[0].style is not None else None  # B x I
    index = {n: i for i, n in enumerate(numbers)}
    return Captured(key, value, style, parts[0].noise, index, parts[0].margin, parts[0].key_margin)


def capture(
    generator: Generator, layer: str, numbers: Iterable[int], seed: int, latents: Mapping[int, Tensor] | None = None
) -> Captured:
    """Run the numbered images up to the layer, each once; see `activations` and `captured_from`."""
    distinct = list(dict.fromkeys(numbers))
    return captured_from(layer, distinct, activations(generator, layer, distinct, seed, latents))


@dataclass(frozen=True)
class Placed:
    """One insertion target with the image it belongs to and two boxes on the value map: the crop that it covers, and
    the part of it where the object is: what is left are a margin and the alignment to the layer's stride.
    """

    image: int
    target: InsertionTarget
    crop: Box
    box: Box

    def loss(self, value: Tensor) -> float:
        """Mean |value - goal| inside `box`, with the target's weights. value: O x H x W, the whole map."""
        top, left = self.box.top - self.crop.top, self.box.left - self.crop.left
        rows, columns = self.box.slices()
        part = (slice(top, top + self.box.height), slice(left, left + self.box.width))
        distance = (value[:, rows, columns] - self.target.goal[:, part[0], part[1]]).abs().mean(0)  # h x w
        if self.target.weight is None:
            return float(distance.mean())
        weight = self.target.weight[part]  # h x w
        return float((distance * weight).sum() / weight.sum())


@dataclass(frozen=True)
class PastedObject:
    """The object as it is pasted: values O x h x w inside the box of its mask, alpha h x w.

    margin: of the maps it was cut from.
    """

    values: Tensor
    alpha: Tensor
    margin: int = 0


def cut_object(captured: Captured, selection: Selection, image_size: tuple[int, int]) -> PastedObject:
    """The object's values inside the bounding box of its mask, and the mask there as alpha (paper, section 3.2)."""
    area = mask_on_map(selection.mask, captured.value_size, image_size, "object mask", captured.margin)
    area = area.to(captured.value.device)
    rows, columns = bounding_box(area, "object mask").slices()
    values = captured.value[captured.index[selection.image]]
    return PastedObject(values[:, rows, columns], area[rows, columns], captured.margin)


def paste_values(
    values: Tensor,
    thing: PastedObject,
    selection: Selection,
    image_size: tuple[int, int],
    what: str,
    shift: Place | None = None,
) -> tuple[Tensor, Box]:
    """values O x H x W with the object composited at the centre of the selection's mask, and the box it fills.

    shift: moves it from there, by picture pixels rounded to those of the map.
    """
    size = (values.shape[1], values.shape[2])
    box = landing(thing.alpha.shape, size, selection, image_size, what, shift, thing.margin)
    rows, columns = box.slices()
    goal = values.clone()
    goal[:, rows, columns] = (1 - thing.alpha) * values[:, rows, columns] + thing.alpha * thing.values
    return goal, box


def landing(
    thing: tuple[int, int],
    size: tuple[int, int],
    selection: Selection,
    image_size: tuple[int, int],
    what: str,
    shift: Place | None = None,
    margin: int = 0,
) -> Box:
    """Where an object of `thing` = (height, width) pixels lands on a value map of `size`, of which `margin` pixels on
    every side lie around the picture.
    """
    y, x = bounding_box(mask_on_map(selection.mask, size, image_size, what, margin), what).center
    if shift is not None:
        y += round(shift.dy * (size[0] - 2 * margin) / image_size[0])
        x += round(shift.dx * (size[1] - 2 * margin) / image_size[1])
    return place(thing[0], thing[1], (y, x), size)


def paste_target(
    conv: ConvLayer,
    captured: Captured,
    selection: Selection,
    thing: PastedObject,
    image_size: tuple[int, int],
    *,
    weighting: str,
    margin: int,
    surroundings: bool,
    what: str,
    shift: Place | None = None,
) -> Placed:
    """The insertion target for one image: the object at the centre of its mask, with `margin` unchanged pixels around
    its box.
    """
    goal, box = paste_values(captured.value[captured.index[selection.image]], thing, selection, image_size, what, shift)
    weight = None
    if weighting == "alpha":
        weight = torch.zeros(captured.value_size, device=goal.device)  # H x W
        weight[grow(box, margin, captured.value_size).slices()] = 1
        weight[box.slices()] = thing.alpha
    return make_target(
        conv, captured, selection.image, goal, box, margin=margin, weight=weight, surroundings=surroundings
    )


def make_target(
    conv: ConvLayer,
    captured: Captured,
    image: int,
    goal: Tensor,
    box: Box,
    *,
    margin: int = 0,
    weight: Tensor | None = None,
    surroundings: bool = True,
) -> Placed:
    """Cut goal (O x H x W), weight (H x W), noise and key of one image to `box` with a margin, aligned to the layer's
    stride.
    """
    row = captured.index[image]
    crop = align(grow(box, margin, captured.value_size), 2 if conv.blur is not None else 1)
    rows, columns = crop.slices()
    target = InsertionTarget(
        key=crop_key(conv, captured.key[row], crop, surroundings=surroundings),
        goal=goal[:, rows, columns].contiguous(),
        style=None if captured.style is None else captured.style[row],
        noise=None if captured.noise is None else captured.noise[rows, columns].contiguous(),
        weight=None if weight is None else weight[rows, columns].contiguous(),
    )
    return Placed(image, target, crop, box)


def share_clamped(placed: Iterable[Placed], after: Captured, bound: float | None) -> float:
    """The share of the values in the pasted boxes that lie at the layer's bound; 0 where it has none."""
    if bound is None:
        return 0.0
    at = total = 0
    for target in placed:
        rows, columns = target.box.slices()
        values = after.value[after.index[target.image]][:, rows, columns]  # O x h x w
        at, total = at + int((values.abs() >= bound).sum()), total + values.numel()
    return at / total


def value_of(conv: ConvLayer, captured: Captured, row: int, key: Tensor) -> Tensor:
    """The layer's value O x H x W for another key map (I x h x w) of a captured image, with that image's style."""
    whole = Box(0, 0, *captured.value_size)
    style = None if captured.style is None else captured.style[row]
    with torch.no_grad():
        return layer_values(
            conv, InsertionTarget(crop_key(conv, key, whole), captured.value[row], style, captured.noise)
        )


def context_examples(
    captured: Captured, selections: Iterable[Selection], image_size: tuple[int, int], what: str = "context mask"
) -> list[tuple[Tensor, Tensor]]:
    """The context as (key map I x h x w, area h x w) pairs for `keys.context_directions`."""
    examples = []
    for i, selection in enumerate(selections):
        area = mask_on_map(selection.mask, captured.key_size, image_size, f"{what} {i}", captured.key_margin)
        area = area.to(captured.key.device)
        if not (area > 0).any():
            raise EditError(f"{what} {i} (image {selection.image}) is empty: expected painted pixels")
        examples.append((captured.key[captured.index[selection.image]], area))
    return examples
