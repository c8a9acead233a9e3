"""StyleGAN3 from its published definition, in float64 where its input is, and random weights in NVIDIA's layout.

Filters of its own for every image, zeros between the pixels, one filter at a time. Independent of pyrewrite; used to
judge it.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from generators_reference import upfirdn
from nvidia_reference import dense, mapped, square_filter

SCALE = 0.25


def layer_names(state):
    found = {m[1] for name in state if (m := re.match(r"synthesis\.(L\d+_\d+_\d+)\.", name))}
    return sorted(found, key=lambda name: int(name[1:].split("_")[0]))


def random_state(
    rates=(8, 8, 16, 16, 16), channels=(6, 6, 5, 4, 3), margin=4, kernel=3, radial=False, taps=6, z=7, w=5, layers=2,
    classes=0, image_channels=3, seed=0,
):  # fmt: skip
    """Names of NVIDIA's layout -> float32 tensors, and the settings beside them.

    rates: of what each layer puts out, the last of them without a margin; the colours keep the last rate.
    """
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    state, width = {}, z
    if classes:
        state["mapping.embed.weight"], state["mapping.embed.bias"] = rand(w, classes), rand(w)
        width += w
    for n in range(layers):
        state[f"mapping.fc{n}.weight"], state[f"mapping.fc{n}.bias"] = 100 * rand(w, width), 10 * rand(w)
        width = w
    state["mapping.w_avg"] = rand(w) / 3

    first = channels[0]
    directions, lengths = rand(first, 2), 2 * torch.rand(first, 1, generator=g)
    state["synthesis.input.freqs"] = directions / directions.norm(dim=1, keepdim=True) * lengths
    state["synthesis.input.phases"] = torch.rand(first, generator=g) - 0.5
    state["synthesis.input.transform"] = torch.eye(3)
    state["synthesis.input.weight"] = rand(first, first)
    state["synthesis.input.affine.weight"] = rand(4, w) / 9
    state["synthesis.input.affine.bias"] = torch.tensor([1.0, 0, 0, 0])
    settings = {"synthesis.output_scale": SCALE, "synthesis.input.sampling_rate": float(rates[0])}
    settings["synthesis.input.bandwidth"] = 2.0

    def low_pass(length, two):
        f = torch.hann_window(length + 2, periodic=False)[1:-1] + rand(length) / 50  # not quite symmetric
        f = torch.outer(f, f) + rand(length, length) / 99 if two else f
        return f / f.sum()

    sizes = [rate + 2 * margin for rate in rates[:-1]] + [rates[-1]] * 2
    before, i = rates[0], first
    for n, (rate, o) in enumerate(zip([*rates, rates[-1]], [*channels, image_channels], strict=True)):
        rgb = n == len(rates)
        name = f"synthesis.L{n}_{sizes[n]}_{o}"
        k = 1 if rgb else kernel
        state[f"{name}.weight"], state[f"{name}.bias"] = rand(o, i, k, k), rand(o) / 5
        state[f"{name}.affine.weight"], state[f"{name}.affine.bias"] = rand(i, w), 1 + rand(i) / 9
        state[f"{name}.magnitude_ema"] = 0.5 + torch.rand((), generator=g)
        high = max(before, rate) * (1 if rgb else 2)
        up, down = high // before, high // rate
        if up > 1:
            state[f"{name}.up_filter"] = low_pass(taps * up, False)
        if down > 1:
            state[f"{name}.down_filter"] = low_pass(taps * down, radial and n < len(rates) - 2)
        settings |= {f"{name}.up_factor": up, f"{name}.down_factor": down, f"{name}.conv_clamp": 256}
        before, i = rate, o
    return state, settings


def features(state, settings, w, size):
    name = "synthesis.input"
    t = dense(state, f"{name}.affine", w)
    t = t / t[:, :2].norm(dim=1, keepdim=True)
    freqs, phases, rate = state[f"{name}.freqs"], state[f"{name}.phases"], settings[f"{name}.sampling_rate"]
    bandwidth = settings[f"{name}.bandwidth"]
    out = []
    for cosine, sine, x, y in t:
        turn, move = torch.eye(3, dtype=w.dtype), torch.eye(3, dtype=w.dtype)
        turn[:2, :2] = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=w.dtype)
        move[:2, 2] = torch.tensor([-x, -y], dtype=w.dtype)
        matrix = turn @ move @ state[f"{name}.transform"]
        f, p = freqs @ matrix[:2, :2], phases + freqs @ matrix[:2, 2]
        amplitudes = (1 - (f.norm(dim=1) - bandwidth) / (rate / 2 - bandwidth)).clamp(0, 1)
        at = (torch.arange(size, dtype=w.dtype) - (size - 1) / 2) / rate
        maps = [torch.sin(2 * math.pi * (at * a + at[:, None] * b + c)) for (a, b), c in zip(f, p, strict=True)]
        mixed = state[f"{name}.weight"] / math.sqrt(len(f)) @ (torch.stack(maps) * amplitudes[:, None, None]).flatten(1)
        out.append(mixed.view(len(f), size, size))
    return torch.stack(out)


def filtered_lrelu(x, up_filter, down_filter, up, down, before, after, clamp):
    one = torch.ones(1, 1, dtype=x.dtype)
    f = one if up_filter is None else square_filter(up_filter)
    x = F.leaky_relu(upfirdn(x, f * up**2, up, before, after), 0.2) * math.sqrt(2)
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    f = one if down_filter is None else square_filter(down_filter)
    return upfirdn(x, f, 1, 0, 0)[:, :, ::down, ::down]


def modulated(state, name, x, w, demodulate):
    weight = state[f"{name}.weight"]
    styles = dense(state, f"{name}.affine", w)
    if demodulate:
        weight = weight / weight.square().mean((1, 2, 3), keepdim=True).sqrt()
        styles = styles / styles.square().mean().sqrt()
    else:
        styles = styles / math.sqrt(weight[0].numel())
    out, keys = [], []
    for image, style in zip(x, styles, strict=True):
        filters = weight * style[:, None, None]
        if demodulate:
            filters = filters / (filters.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        filters = filters / state[f"{name}.magnitude_ema"].sqrt()
        out.append(F.conv2d(image[None], filters, padding=weight.shape[-1] - 1))
        own = style / style.square().mean().sqrt()
        keys.append(image * own[:, None, None] / state[f"{name}.magnitude_ema"].sqrt())
    return torch.cat(out) + state[f"{name}.bias"][:, None, None], torch.stack(keys)


def images(state, settings, z, label=None, truncation=1.0, ws=None):
    """-> images, not clamped, keys by layer name, values by layer name. ws: B x num_ws x w, in place of z."""
    names = layer_names(state)
    if ws is None:
        w = mapped(state, z, label)
        w = state["mapping.w_avg"] + truncation * (w - state["mapping.w_avg"])
        ws = w[:, None].expand(-1, len(names) + 1, -1)
    size = int(names[0].split("_")[1])
    x, keys, values = features(state, settings, ws[:, 0], size), {}, {}
    for n, short in enumerate(names[:-1]):
        name = f"synthesis.{short}"
        value, key = modulated(state, name, x, ws[:, n + 1], True)
        keys[f"layer{n + 2}"], values[f"layer{n + 2}"] = key, value
        up, down, out = settings[f"{name}.up_factor"], settings[f"{name}.down_factor"], int(short.split("_")[1])
        filters = [state.get(f"{name}.{kind}_filter") for kind in ("up", "down")]
        taps = sum(len(f) - 1 for f in filters if f is not None)
        total = (out - 1) * down + 1 - value.shape[-1] * up + taps
        before = (total + up) // 2
        clamp = settings.get(f"{name}.conv_clamp")
        x = filtered_lrelu(value, *filters, up, down, before, total - before, clamp)
    name = f"synthesis.{names[-1]}"
    rgb, _ = modulated(state, name, x, ws[:, -1], False)
    if f"{name}.conv_clamp" in settings:
        rgb = rgb.clamp(-settings[f"{name}.conv_clamp"], settings[f"{name}.conv_clamp"])
    return rgb * settings["synthesis.output_scale"], keys, values
