"""The two published architectures, written plainly from their papers: filters of its own for every image.

Also random checkpoints of any size. Independent of pyrewrite; used to judge it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def fir(taps=(1.0, 3.0, 3.0, 1.0)) -> Tensor:
    k = torch.tensor(taps)
    k = k[:, None] * k[None]
    return 4 * k / k.sum()


def linear(state, name, x, rate=1.0):
    return F.linear(x, state[f"{name}.weight"] * rate / math.sqrt(x.shape[1]), state[f"{name}.bias"] * rate)


def upfirdn(x, kernel, up, before, after):
    """Zeros between the pixels, zero padding, true convolution of each channel."""
    b, c, h, w = x.shape
    spread = x.new_zeros(b, c, h, up, w, up)
    spread[:, :, :, 0, :, 0] = x
    spread = F.pad(spread.view(b * c, 1, h * up, w * up), (before, after, before, after))
    y = F.conv2d(spread, kernel.flip(0, 1)[None, None])
    return y.view(b, c, *y.shape[2:])


def modulated(state, name, x, w, demodulate):
    """B x I x h x w -> B x O x H x W by a grouped convolution, each image with filters of its own."""
    _, o, i, k, _ = state[f"{name}.weight"].shape
    b, _, h, wd = x.shape
    style = linear(state, f"{name}.modulation", w)
    filters = state[f"{name}.weight"] * style.view(b, 1, i, 1, 1) / math.sqrt(i * k * k)
    if demodulate:
        filters = filters / (filters.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    kernel = state.get(f"{name}.blur.kernel")
    x = x.reshape(1, b * i, h, wd)
    if kernel is None:
        return F.conv2d(x, filters.view(b * o, i, k, k), padding=k // 2, groups=b).view(b, o, h, wd)
    y = F.conv_transpose2d(x, filters.transpose(1, 2).reshape(b * i, o, k, k), stride=2, groups=b)
    p = len(kernel) - 2 - (k - 1)
    return upfirdn(y.view(b, o, *y.shape[2:]), kernel, 1, (p + 1) // 2 + 1, p // 2 + 1)


def mapping(state, z):
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    n = 1
    while f"style.{n}.weight" in state:
        w = F.leaky_relu(linear(state, f"style.{n}", w, 0.01), 0.2) * math.sqrt(2)
        n += 1
    return w


def stylegan2(state, z, truncation=1.0):
    """state: rosinality names and `latent_avg` -> images, keys by layer name, values by layer name."""
    w = state["latent_avg"] + truncation * (mapping(state, z) - state["latent_avg"])
    x, rgb, n, keys, values = state["input.input"].expand(len(z), -1, -1, -1), None, 0, {}, {}
    while n == 0 or f"convs.{n - 1}.conv.weight" in state:
        name = f"convs.{n - 1}" if n else "conv1"
        keys[f"layer{n + 2}"] = x * linear(state, f"{name}.conv.modulation", w)[:, :, None, None]
        x = modulated(state, f"{name}.conv", x, w, True)
        x = x + state[f"{name}.noise.weight"] * state[f"noises.noise_{n}"]
        x = F.leaky_relu(x + state[f"{name}.activate.bias"][:, None, None], 0.2) * math.sqrt(2)
        values[f"layer{n + 2}"] = x
        if n % 2 == 0:
            name = f"to_rgbs.{n // 2 - 1}" if n else "to_rgb1"
            new = modulated(state, f"{name}.conv", x, w, False) + state[f"{name}.bias"]
            if n:
                kernel = state[f"{name}.upsample.kernel"]
                p = len(kernel) - 2
                new = new + upfirdn(rgb, kernel, 2, (p + 1) // 2 + 1, p // 2)
            rgb = new
        n += 1
    return rgb.clamp(-1, 1), keys, values


def progan(state, z):
    """state: layerN names -> images, keys by layer name, values by layer name."""
    norm = lambda x: x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()  # noqa: E731
    x, n, keys, values = z[:, :, None, None], 1, {}, {}
    while f"layer{n}.conv.weight" in state:
        weight = state[f"layer{n}.conv.weight"]
        x = norm(x)
        if n > 1 and n % 2:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        keys[f"layer{n}"] = x
        k = weight.shape[-1]
        x = values[f"layer{n}"] = F.conv2d(x, weight, padding=k - 1 if n == 1 else k // 2)
        x = x * math.sqrt(2) / (k * math.sqrt(weight.shape[1])) + state[f"layer{n}.wscale.b"][:, None, None]
        x = F.leaky_relu(x, 0.2)
        n += 1
    name = next(name for name in state if name.startswith("output_")).split(".")[0]
    x = F.conv2d(norm(x), state[f"{name}.conv.weight"]) / math.sqrt(x.shape[1])
    return (x + state[f"{name}.wscale.b"][:, None, None]).clamp(-1, 1), keys, values


def stylegan2_state(channels=(6, 5, 4), z=7, mapping=(7, 5), image_channels=3, taps=(1, 3, 3, 1), base=4, seed=0):
    """A random rosinality state dict: channels at each resolution, widths of the mapping layers."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    state, width, w = {}, z, mapping[-1]
    for n, out in enumerate(mapping, 1):
        state[f"style.{n}.weight"], state[f"style.{n}.bias"] = 100 * rand(out, width), 10 * rand(out)
        width = out
    state["input.input"] = rand(1, channels[0], base, base)

    def conv(name, o, i, k):
        state[f"{name}.weight"] = rand(1, o, i, k, k)
        state[f"{name}.modulation.weight"], state[f"{name}.modulation.bias"] = rand(i, w), 1 + rand(i) / 9

    def styled(n, o, i):
        name = f"convs.{n - 1}" if n else "conv1"
        conv(f"{name}.conv", o, i, 3)
        if n % 2:
            state[f"{name}.conv.blur.kernel"] = fir(taps)
        state[f"{name}.noise.weight"], state[f"{name}.activate.bias"] = rand(1) / 5, rand(o) / 5
        size = base * 2 ** ((n + 1) // 2)
        state[f"noises.noise_{n}"] = rand(1, 1, size, size)

    def rgb(n, i):
        name = f"to_rgbs.{n // 2 - 1}" if n else "to_rgb1"
        conv(f"{name}.conv", image_channels, i, 1)
        state[f"{name}.bias"] = rand(1, image_channels, 1, 1) / 9
        state[f"{name}.conv.weight"] /= 5
        if n:
            state[f"{name}.upsample.kernel"] = fir(taps)

    styled(0, channels[0], channels[0])
    rgb(0, channels[0])
    for level in range(1, len(channels)):
        styled(2 * level - 1, channels[level], channels[level - 1])
        styled(2 * level, channels[level], channels[level])
        rgb(2 * level, channels[level])
    return state


def sequential(state, dconv=False):
    """The same tensors under the names of the official sequential generator."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] in ("conv1", "convs"):
            number, rest = (2, parts[1:]) if parts[0] == "conv1" else (int(parts[1]) + 3, parts[2:])
            if rest[0] == "conv":
                rest = ["mconv", *(["dconv"] if dconv and rest[1] == "weight" else []), *rest[1:]]
            name = ".".join([f"layer{number}", "conv" if number == 2 else "sconv", *rest])
        elif parts[0] == "to_rgbs" and parts[2] == "upsample":
            name = f"up_rgb{int(parts[1]) + 1}.kernel"
        elif parts[0] in ("to_rgb1", "to_rgbs"):
            number, rest = (1, parts[1:]) if parts[0] == "to_rgb1" else (int(parts[1]) + 2, parts[2:])
            name = ".".join([f"to_rgb{number}", "rgb", *rest])
        renamed[name] = tensor
    return renamed


def progan_state(z=5, channels=(6, 4), image_channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    state, n, i = {}, 1, z
    for o in channels:
        for k in (4 if n == 1 else 3, 3):
            state[f"layer{n}.conv.weight"] = torch.randn(o, i, k, k, generator=g)
            state[f"layer{n}.wscale.b"] = torch.randn(o, generator=g) / 5
            n, i = n + 1, o
    size = 4 * 2 ** (len(channels) - 1)
    state[f"output_{size}x{size}.conv.weight"] = torch.randn(image_channels, i, 1, 1, generator=g)
    state[f"output_{size}x{size}.wscale.b"] = torch.randn(image_channels, generator=g) / 5
    return state


def double(state):
    return {name: tensor.double() for name, tensor in state.items()}
