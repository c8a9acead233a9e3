"""Generators of other code bases, written from their published definitions, and random weights under their names.

Independent of pyrewrite and of each other's layouts; used to judge what pyrewrite makes of the same files.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from generators_reference import upfirdn
from torch import nn


def pixel_norm(x, epsilon=1e-8):
    return x / (x.square().mean(1, keepdim=True) + epsilon).sqrt()


SQRT2 = math.sqrt(2)


def lrelu(x, gain=SQRT2):
    return F.leaky_relu(x, 0.2) * gain


def fir(taps=(1, 3, 3, 1)):
    k = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(k, k) / k.sum() ** 2


def randoms(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g)


# -- GenForce: StyleGAN2 -----------------------------------------------------------------------------------------------


def genforce_stylegan2(state, z, truncation=1.0):
    """state: GenForce's names -> B x C x H x W."""
    w, n = pixel_norm(z), 0
    while f"mapping.dense{n}.weight" in state:
        weight, bias = state[f"mapping.dense{n}.weight"], state[f"mapping.dense{n}.bias"]
        w = lrelu(F.linear(w, weight * 0.01 / math.sqrt(w.shape[1]), bias * 0.01))
        n += 1
    w = state["truncation.w_avg"] + (w - state["truncation.w_avg"]) * truncation

    def block(name, x, demodulate):
        weight = state[f"{name}.weight"]
        o, i, k, _ = weight.shape
        style = F.linear(w, state[f"{name}.style.weight"] / math.sqrt(w.shape[1]), state[f"{name}.style.bias"]) + 1
        filters = weight / math.sqrt(i * k * k) * style.view(-1, 1, i, 1, 1)  # B x O x I x k x k
        if demodulate:
            filters = filters / (filters.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
        kernel = state.get(f"{name}.filter.kernel")
        out = []
        for image, own in zip(x, filters, strict=True):
            if kernel is None:
                out.append(F.conv2d(image[None], own, padding=k // 2))
                continue
            y = F.conv_transpose2d(image[None], own.transpose(0, 1).flip(2, 3), stride=2)
            taps = kernel.shape[-1]
            padding = taps - 1 + (2 - k)  # what is left of the size, around a correlation
            y = F.pad(y, ((padding + 1) // 2, padding // 2) * 2)
            out.append(F.conv2d(y, kernel.expand(o, 1, taps, taps), groups=o))
        x = torch.cat(out)
        if f"{name}.noise" in state:
            x = x + state[f"{name}.noise"] * state[f"{name}.noise_strength"]
        return x + state[f"{name}.bias"].view(1, -1, 1, 1)

    x, image, n = state["synthesis.early_layer.const"].expand(len(z), -1, -1, -1), None, 0
    while f"synthesis.layer{n}.weight" in state:
        x = lrelu(block(f"synthesis.layer{n}", x, True))
        if n % 2 == 0 and f"synthesis.output{n // 2}.weight" in state:
            colours = block(f"synthesis.output{n // 2}", x, False)
            if image is not None:
                kernel = state["synthesis.upsample.kernel"][0, 0]
                p = len(kernel) - 2
                image = upfirdn(image, kernel.flip(0, 1), 2, (p + 1) // 2 + 1, p // 2)  # a correlation
                colours = colours + image
            image = colours
        n += 1
    return image


def genforce_stylegan2_state(channels=(6, 5, 4), z=7, hidden=8, w=5, layers=3, image_channels=3, seed=0):
    rand, state = randoms(seed), {}
    widths = [z, *[hidden] * (layers - 1), w]
    for n in range(layers):
        state[f"mapping.dense{n}.weight"] = 100 * rand(widths[n + 1], widths[n])
        state[f"mapping.dense{n}.bias"] = 10 * rand(widths[n + 1])
    state["truncation.w_avg"] = rand(w) / 3
    state["synthesis.early_layer.const"] = rand(1, channels[0], 4, 4)
    # Not symmetric, so that a filter that was turned round would show.
    kernel = 4 * fir()[None, None] * torch.linspace(0.5, 1.5, 16).view(1, 1, 4, 4)

    def block(name, o, i, k, scale=1.0):
        state[f"{name}.weight"], state[f"{name}.bias"] = scale * rand(o, i, k, k), rand(o) / 5
        state[f"{name}.style.weight"], state[f"{name}.style.bias"] = rand(i, w), rand(i) / 9

    for n in range(2 * len(channels) - 1):
        level = (n + 1) // 2
        block(f"synthesis.layer{n}", channels[level], channels[level - n % 2], 3)
        state[f"synthesis.layer{n}.noise"] = rand(1, 1, 4 * 2**level, 4 * 2**level)
        state[f"synthesis.layer{n}.noise_strength"] = rand(1)[0] / 5
        if n % 2:
            state[f"synthesis.layer{n}.filter.kernel"] = kernel.clone()
        else:
            block(f"synthesis.output{level}", image_channels, channels[level], 1, 0.2)
    if len(channels) > 1:
        state["synthesis.upsample.kernel"] = kernel.flip(3).clone()
    return state


# -- GenForce: Progressive GAN -----------------------------------------------------------------------------------------


def genforce_pggan(state, z, fused=False):
    """state: GenForce's names -> B x C x H x W."""
    x, n = pixel_norm(z)[:, :, None, None] * math.sqrt(z.shape[1]), 0

    def block(name, x, gain, padding, up):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        x, k = pixel_norm(x), weight.shape[-1]
        weight = weight * gain / math.sqrt(k * k * x.shape[1])
        if up and fused:
            spread = F.pad(weight, (1, 1, 1, 1))
            spread = spread[..., 1:, 1:] + spread[..., :-1, 1:] + spread[..., 1:, :-1] + spread[..., :-1, :-1]
            return F.conv_transpose2d(x, spread, bias, stride=2, padding=1)
        if up:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.conv2d(x, weight, bias, padding=padding)

    while f"layer{n}.weight" in state:
        k = state[f"layer{n}.weight"].shape[-1]
        x = lrelu(block(f"layer{n}", x, math.sqrt(2), k - 1 if n == 0 else k // 2, n > 0 and n % 2 == 0), 1)
        n += 1
    return block(f"output{n // 2 - 1}", x, 1.0, 0, False)


def genforce_pggan_state(channels=(6, 4, 3), z=5, image_channels=3, fused=False, seed=0):
    rand, state, i, n = randoms(seed), {"lod": torch.zeros(())}, z, 0
    for level, o in enumerate(channels):
        for k in (3 if level else 4, 3):
            turned = fused and level and n % 2 == 0
            state[f"layer{n}.weight"] = rand(i, o, k, k) if turned else rand(o, i, k, k)
            state[f"layer{n}.bias"] = rand(o) / 5
            n, i = n + 1, o
        state[f"output{level}.weight"], state[f"output{level}.bias"] = (
            rand(image_channels, o, 1, 1) / 5,
            rand(image_channels) / 5,
        )
    return state


# -- Progressive GAN in TensorFlow's layouts ---------------------------------------------------------------------------


def tensorflow_progan(state, z):
    """state: TensorFlow's names and layouts -> B x C x H x W."""
    x = pixel_norm(z)
    weight = state["4x4/Dense/weight"]  # z x 16 O
    x = (x @ weight * math.sqrt(2) / 4 / math.sqrt(x.shape[1])).view(len(x), -1, 4, 4)
    x = lrelu(x + state["4x4/Dense/bias"].view(-1, 1, 1), 1)
    x, size = tensorflow_conv(state, "4x4/Conv", x), 4
    while f"{2 * size}x{2 * size}/Conv1/weight" in state:
        size *= 2
        name = f"{size}x{size}/Conv0"
        if f"{name}_up/weight" in state:  # k x k x O x I: nearest up-sampling and convolution in one
            weight = state[f"{name}_up/weight"] * math.sqrt(2) / math.sqrt(9 * x.shape[1])
            w = F.pad(weight.permute(3, 2, 0, 1), (1, 1, 1, 1))  # I x O x 5 x 5
            w = w[..., 1:, 1:] + w[..., :-1, 1:] + w[..., 1:, :-1] + w[..., :-1, :-1]
            y = F.conv_transpose2d(pixel_norm(x), w, stride=2, padding=1)
            x = lrelu(y + state[f"{name}_up/bias"].view(-1, 1, 1), 1)
        else:
            x = tensorflow_conv(state, name, x, up=True)
        x = tensorflow_conv(state, f"{size}x{size}/Conv1", x)
    weight = state["ToRGB_lod0/weight"].permute(3, 2, 0, 1) / math.sqrt(x.shape[1])
    return F.conv2d(pixel_norm(x), weight, state["ToRGB_lod0/bias"])


def tensorflow_conv(state, name, x, up=False):
    x = pixel_norm(x)
    if up:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    weight = state[f"{name}/weight"].permute(3, 2, 0, 1)  # from k x k x I x O
    k = weight.shape[-1]
    x = F.conv2d(x, weight * math.sqrt(2) / math.sqrt(k * k * x.shape[1]), state[f"{name}/bias"], padding=k // 2)
    return lrelu(x, 1)


def tensorflow_progan_state(channels=(6, 4, 3), z=5, image_channels=3, up="Conv0_up", seed=0):
    rand, state = randoms(seed), {"lod": torch.zeros(())}

    def put(name, shape, o):
        state[f"{name}/weight"], state[f"{name}/bias"] = rand(*shape), rand(o) / 5

    put("4x4/Dense", (z, 16 * channels[0]), channels[0])
    put("4x4/Conv", (3, 3, channels[0], channels[0]), channels[0])
    for level, o in enumerate(channels[1:], 1):
        size, i = 4 * 2**level, channels[level - 1]
        put(f"{size}x{size}/{up}", (3, 3, o, i) if up == "Conv0_up" else (3, 3, i, o), o)
        put(f"{size}x{size}/Conv1", (3, 3, o, o), o)
    for level, o in enumerate(channels):
        name = f"ToRGB_lod{len(channels) - 1 - level}"
        put(name, (1, 1, o, image_channels), image_channels)
        state[f"{name}/weight"] /= 5
    return state


# -- mmgeneration ------------------------------------------------------------------------------------------------------


def mmgeneration(state, z):
    """state: names of StyleGANv2Generator -> B x C x H x W. Fixed noise."""
    w, n = z / (z.square().mean(1, keepdim=True).sqrt() + 1e-6), 1

    def equalized(name, rate=1.0):
        weight = state[f"{name}.weight_orig"]
        fan_in = weight[0].numel() if weight.ndim < 5 else weight[0, 0].numel()
        return weight * rate / math.sqrt(fan_in)

    while f"style_mapping.{n}.linear.weight_orig" in state:
        bias = state[f"style_mapping.{n}.bias"] * 0.01
        w = lrelu(F.linear(w, equalized(f"style_mapping.{n}.linear", 0.01)) + bias)
        n += 1

    def conv(name, x, demodulate):
        style = F.linear(w, equalized(f"{name}.style_modulation.linear")) + state[f"{name}.style_modulation.bias"]
        weight = equalized(name) * style[:, None, :, None, None]  # B x O x I x k x k
        if demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        k, kernel = weight.shape[-1], state.get(f"{name}.blur.kernel")
        if kernel is None:
            return torch.cat([F.conv2d(a[None], f, padding=k // 2) for a, f in zip(x, weight, strict=True)])
        pairs = zip(x, weight, strict=True)
        y = torch.cat([F.conv_transpose2d(a[None], f.transpose(0, 1), stride=2) for a, f in pairs])
        p = len(kernel) - 2 - (k - 1)
        return upfirdn(y, kernel, 1, (p + 1) // 2 + 1, p // 2 + 1)

    x, image, n = state["constant_input.input"].expand(len(z), -1, -1, -1), None, 0
    while n == 0 or f"convs.{n - 1}.conv.weight_orig" in state:
        name = f"convs.{n - 1}" if n else "conv1"
        x = conv(f"{name}.conv", x, True) + state[f"{name}.noise_injector.weight"] * state[f"injected_noise_{n}"]
        x = lrelu(x + state[f"{name}.activate.bias"].view(1, -1, 1, 1))
        if n % 2 == 0:
            name = f"to_rgbs.{n // 2 - 1}" if n else "to_rgb1"
            colours = conv(f"{name}.conv", x, False) + state[f"{name}.bias"]
            if image is not None:
                kernel = state[f"{name}.upsample.kernel"]
                p = len(kernel) - 2
                colours = colours + upfirdn(image, kernel, 2, (p + 1) // 2 + 1, p // 2)
            image = colours
        n += 1
    return image


def mmgeneration_state(channels=(6, 5, 4), w=6, layers=2, seed=0):
    rand, state = randoms(seed), {}
    for n in range(1, layers + 1):
        state[f"style_mapping.{n}.bias"] = 10 * rand(w)
        state[f"style_mapping.{n}.linear.weight_orig"] = 100 * rand(w, w)
    state["constant_input.input"] = rand(1, channels[0], 4, 4)

    def conv(name, o, i, k, scale=1.0):
        state[f"{name}.weight_orig"] = scale * rand(1, o, i, k, k)
        state[f"{name}.style_modulation.bias"] = 1 + rand(i) / 9
        state[f"{name}.style_modulation.linear.weight_orig"] = rand(i, w)

    for n in range(2 * len(channels) - 1):
        level, name = (n + 1) // 2, f"convs.{n - 1}" if n else "conv1"
        conv(f"{name}.conv", channels[level], channels[level - n % 2], 3)
        if n % 2:
            state[f"{name}.conv.blur.kernel"] = 4 * fir()
        state[f"{name}.noise_injector.weight"] = rand(1) / 5
        state[f"{name}.activate.bias"] = rand(channels[level]) / 5
        state[f"injected_noise_{n}"] = rand(1, 1, 4 * 2**level, 4 * 2**level)
        if n % 2 == 0:
            name = f"to_rgbs.{level - 1}" if n else "to_rgb1"
            conv(f"{name}.conv", 3, channels[level], 1, 0.2)
            state[f"{name}.bias"] = rand(1, 3, 1, 1) / 9
            if n:
                state[f"{name}.upsample.kernel"] = 4 * fir()
    return state


# -- DCGAN -------------------------------------------------------------------------------------------------------------


class TutorialGenerator(nn.Module):
    """A stack of transposed convolutions as the tutorial describes it, of any widths."""

    def __init__(self, z=5, widths=(6, 4), image_channels=3, kernel=4, base=4, bias=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        layers, i = [], z
        for n, o in enumerate((*widths, image_channels)):
            k, stride, padding = (base, 1, 0) if n == 0 else (kernel, 2, (kernel - 2) // 2)
            layers.append(nn.ConvTranspose2d(i, o, k, stride, padding, bias=bias))
            if n < len(widths):
                norm = nn.BatchNorm2d(o)
                nn.init.normal_(norm.weight, 1, 0.2)
                nn.init.normal_(norm.bias, 0, 0.2)
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                layers += [norm, nn.ReLU()]
            i = o
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.eval().requires_grad_(False)

    def forward(self, z):
        return self.main(z[:, :, None, None])
