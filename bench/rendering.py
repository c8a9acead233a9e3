"""Rendering pictures, and the same networks in plain torch: as published, and as stock torch can at best."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core import Case, Way, relative_error
from pyrewrite.generators import Generator, ProGAN, ProGANShape, StyleGAN2, StyleGAN2Shape, load_generator

BOUND = 1e-5  # of the pictures, relative; clamped at hard edges, which amplify rounding
State = dict[str, Tensor]


def generator_of(size: dict) -> Generator:
    """A bundled one by its `generator`, or "stylegan2" or "progan" with random weights, and the channels of each level
    in `channels`.
    """
    if "channels" not in size:
        return load_generator(size["generator"])
    channels = size["channels"]
    pairs = list(zip([channels[0], *channels], channels, strict=False))
    levels = len(channels) - 1
    if size["generator"] == "progan":
        convs = [(o, i, k) for n, (i, o) in enumerate(pairs) for i, k in ((i, 3 if n else 4), (o, 3))]
        generator: Generator = ProGAN(ProGANShape(tuple(convs)))
    else:
        convs = [(o, i, 3) for n, (i, o) in enumerate(pairs) for i in ((i, o) if n else (i,))]
        filters = ((4, 4),) * levels
        generator = StyleGAN2(StyleGAN2Shape((channels[0],) * 9, 4, channels[0], tuple(convs), filters, filters))
    torch.manual_seed(0)
    taps = torch.tensor([1.0, 3, 3, 1]) / 4
    for name, tensor in generator.state_dict().items():
        if name.endswith("kernel"):
            tensor.copy_(torch.outer(taps, taps))
        elif name.endswith("modulation.bias"):
            tensor.fill_(1)
        else:
            tensor.normal_().mul_(100 if name.startswith("style.") else 1)
    return generator


# -- StyleGAN2 ---------------------------------------------------------------------------------------------------------


def _linear(state: State, name: str, x: Tensor, rate: float = 1.0) -> Tensor:
    return F.linear(x, state[f"{name}.weight"] * (rate / math.sqrt(x.shape[1])), state[f"{name}.bias"] * rate)


def _mapped(state: State, z: Tensor) -> Tensor:
    w, n = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8), 1
    while f"style.{n}.weight" in state:
        w = F.leaky_relu(_linear(state, f"style.{n}", w, 0.01), 0.2) * math.sqrt(2)
        n += 1
    return w


def _filtered(x: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
    b, c, h, w = x.shape
    x = F.pad(x.reshape(b * c, 1, h, w), (*padding, *padding))
    x = F.conv2d(x, kernel.flip(0, 1)[None, None])
    return x.view(b, c, *x.shape[2:])


def _filters_of_each(state: State, name: str, x: Tensor, w: Tensor, demodulate: bool) -> Tensor:
    """As published: every image has filters of its own, in one grouped convolution."""
    weight = state[f"{name}.weight"]
    _, o, i, k, _ = weight.shape
    b, _, h, width = x.shape
    filters = weight * _linear(state, f"{name}.modulation", w).view(b, 1, i, 1, 1) / math.sqrt(i * k * k)
    if demodulate:
        filters = filters * torch.rsqrt(filters.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, b * i, h, width)
    if f"{name}.blur.kernel" not in state:
        return F.conv2d(x, filters.view(b * o, i, k, k), padding=k // 2, groups=b).view(b, o, h, width)
    filters = filters.transpose(1, 2).reshape(b * i, o, k, k)
    y = F.conv_transpose2d(x, filters, stride=2, groups=b).view(b, o, 2 * h + k - 2, 2 * width + k - 2)
    return _filtered(y, state[f"{name}.blur.kernel"], (1, 1))


def _shared_filters(state: State, name: str, x: Tensor, w: Tensor, demodulate: bool) -> Tensor:
    """The same with styles on the maps: one convolution for the batch, channels_last."""
    weight = state[f"{name}.weight"][0]
    o, i, k, _ = weight.shape
    style, scale = _linear(state, f"{name}.modulation", w), 1 / math.sqrt(i * k * k)
    x = (x * style[:, :, None, None]).contiguous(memory_format=torch.channels_last)
    if f"{name}.blur.kernel" in state:
        kernel = state[f"{name}.blur.kernel"].flip(0, 1).expand(o, 1, -1, -1)
        x = F.conv2d(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), kernel, padding=1, groups=o)
    else:
        x = F.conv2d(x, weight, padding=k // 2)
    if not demodulate:
        return x * scale
    energy = style.square() @ weight.square().sum((2, 3)).t()
    return x * (scale * torch.rsqrt(energy * scale**2 + 1e-8))[:, :, None, None]


def stylegan2(state: State, z: Tensor, modulated) -> Tensor:
    """state: rosinality's names; z: B x z_dim -> B x 3 x H x W"""
    w, n, rgb = _mapped(state, z), 0, None
    x = state["input.input"].expand(len(z), -1, -1, -1)
    while n == 0 or f"convs.{n - 1}.conv.weight" in state:
        name = f"convs.{n - 1}" if n else "conv1"
        x = modulated(state, f"{name}.conv", x, w, True)
        x = x + state[f"{name}.noise.weight"] * state[f"noises.noise_{n}"]
        x = F.leaky_relu(x + state[f"{name}.activate.bias"][:, None, None], 0.2) * math.sqrt(2)
        if n % 2 == 0:
            name = f"to_rgbs.{n // 2 - 1}" if n else "to_rgb1"
            new = modulated(state, f"{name}.conv", x, w, False) + state[f"{name}.bias"]
            if rgb is not None:
                b, c, h, width = rgb.shape
                spread = rgb.new_zeros(b, c, h, 2, width, 2)
                spread[:, :, :, 0, :, 0] = rgb
                new = new + _filtered(spread.view(b, c, 2 * h, 2 * width), state[f"{name}.upsample.kernel"], (2, 1))
            rgb = new
        n += 1
    return rgb.clamp(-1, 1)


# -- Progressive GAN ---------------------------------------------------------------------------------------------------


def progan(state: State, z: Tensor, last: bool) -> Tensor:
    """state: the official names; last: maps are channels_last"""
    layout = torch.channels_last if last else torch.contiguous_format
    x, n = z[:, :, None, None], 1
    while f"layer{n}.conv.weight" in state:
        weight = state[f"layer{n}.conv.weight"]
        k = weight.shape[-1]
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)
        if n > 1 and n % 2:
            x = F.interpolate(x, scale_factor=2)
        x = F.conv2d(x.contiguous(memory_format=layout), weight, padding=k - 1 if n == 1 else k // 2)
        x = x * (math.sqrt(2) / (k * math.sqrt(weight.shape[1]))) + state[f"layer{n}.wscale.b"][:, None, None]
        x = F.leaky_relu(x, 0.2)
        n += 1
    name = next(name for name in state if name.startswith("output_")).split(".")[0]
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)
    x = F.conv2d(x, state[f"{name}.conv.weight"]) / math.sqrt(x.shape[1])
    return (x + state[f"{name}.wscale.b"][:, None, None]).clamp(-1, 1)


# -- the case ----------------------------------------------------------------------------------------------------------


def case(device: str, size: dict) -> Case:
    """`size`: generator and perhaps channels (see `generator_of`), images in a batch."""
    generator = generator_of(size).to(device)
    z = generator.latents(range(size["images"]))
    state = {name: tensor.detach() for name, tensor in generator.state_dict().items()}
    if generator.family == "progan":
        peers = {
            "plain torch": lambda s, z: progan(s, z, False),
            "plain torch, channels_last": lambda s, z: progan(s, z, True),
        }
    else:
        peers = {
            "plain torch, as published": lambda s, z: stylegan2(s, z, _filters_of_each),
            "plain torch, shared filters, channels_last": lambda s, z: stylegan2(s, z, _shared_filters),
        }
    with torch.no_grad():
        truth = next(iter(peers.values()))({name: tensor.double() for name, tensor in state.items()}, z.double())

    def way(name: str, run) -> Way:
        return Way(name, torch.no_grad()(run), lambda images: relative_error(images, truth))

    ways = [way("pyrewrite", lambda: generator(z))]
    ways += [way(name, lambda peer=peer: peer(state, z)) for name, peer in peers.items()]
    maps = sum(
        2 * layer.weight.numel() * (layer.key_resolution if layer.upsample else layer.resolution) ** 2
        for layer in generator.layers.values()
    )
    traffic = 4 * (sum(tensor.numel() for tensor in state.values()) + truth.numel())
    kind = size["generator"] + (f" of {size['channels']} channels" if "channels" in size else "")
    label = f"{kind}, {generator.image_size} x {generator.image_size}, {size['images']} at once"
    return Case("rendering", label, device, traffic, size["images"] * maps, "fp32", BOUND, ways)
