"""StyleGAN2 as NVIDIA's PyTorch repositories define it, and pickles as they write them.

Written from the published definition, in float64 where its input is: up-sampling as zeros between the pixels, a filter
of gain 4 and a true convolution; every image with filters of its own. Independent of pyrewrite; used to judge it.
"""

from __future__ import annotations

import collections
import contextlib
import io
import math
import pickle
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from generators_reference import upfirdn


def dense(state, name, x, rate=1.0):
    return x @ state[f"{name}.weight"].t() * rate / math.sqrt(x.shape[1]) + state[f"{name}.bias"] * rate


def normalised(x):
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def mapped(state, z, label=None):
    x = normalised(z)
    if label is not None:
        c = torch.zeros(len(z), state["mapping.embed.weight"].shape[1], dtype=z.dtype)
        c[:, label] = 1
        x = torch.cat([x, normalised(dense(state, "mapping.embed", c))], 1)
    n = 0
    while f"mapping.fc{n}.weight" in state:
        x = F.leaky_relu(dense(state, f"mapping.fc{n}", x, 0.01), 0.2) * math.sqrt(2)
        n += 1
    return x


def square_filter(f):
    return torch.outer(f, f) if f.ndim == 1 else f


def modulated(weight, x, styles, demodulate, f=None):
    """weight: O x I x k x k, x: B x I x h x w, styles: B x I, f: filter of an up-sampling layer."""
    out = []
    for image, style in zip(x, styles, strict=True):
        w = weight * style[None, :, None, None]
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        k = w.shape[-1]
        if f is None:
            out.append(F.conv2d(image[None], w, padding=k // 2))
        else:
            n = len(f)
            spread = upfirdn(image[None], 4 * f, 2, k // 2 + (n + 1) // 2, k // 2 + (n - 2) // 2)
            out.append(F.conv2d(spread, w.flip(2, 3)))
    return torch.cat(out)


def clamped(x, bound):
    return x if bound is None else x.clamp(-bound, bound)


def layer(state, name, x, w, up, noise, clamps=None):
    f = square_filter(state[f"{name}.resample_filter"]) if up else None
    x = modulated(state[f"{name}.weight"], x, dense(state, f"{name}.affine", w), True, f)
    if noise and f"{name}.noise_const" in state:
        x = x + state[f"{name}.noise_const"] * state[f"{name}.noise_strength"]
    x = F.leaky_relu(x + state[f"{name}.bias"][:, None, None], 0.2) * math.sqrt(2)
    return clamped(x, (clamps or {}).get(name))


def images(state, z, label=None, truncation=1.0, noise=True, clamps=None):
    """state: names of NVIDIA's layout -> B x C x H x W, not clamped. clamps: layer -> bound of what it puts out."""
    clamps = clamps or {}
    w = mapped(state, z, label)
    if truncation != 1:
        w = state["mapping.w_avg"] + truncation * (w - state["mapping.w_avg"])
    base = min(int(name.split(".")[1][1:]) for name in state if name.startswith("synthesis.b"))
    resolution, x, rgb = base, state[f"synthesis.b{base}.const"].expand(len(z), -1, -1, -1), None
    while f"synthesis.b{resolution}.conv1.weight" in state:
        block = f"synthesis.b{resolution}"
        before = x
        if resolution > base:
            x = layer(state, f"{block}.conv0", x, w, True, noise, clamps)
        x = layer(state, f"{block}.conv1", x, w, False, noise, clamps)
        if f"{block}.skip.weight" in state:
            f, weight = square_filter(state[f"{block}.skip.resample_filter"]), state[f"{block}.skip.weight"]
            spread = upfirdn(before, 4 * f, 2, (len(f) + 1) // 2, (len(f) - 2) // 2)
            x = (F.conv2d(spread, weight / math.sqrt(weight.shape[1])) + x) * math.sqrt(0.5)
        if f"{block}.torgb.weight" not in state:
            resolution *= 2
            continue
        weight = state[f"{block}.torgb.weight"]
        style = dense(state, f"{block}.torgb.affine", w) / math.sqrt(weight.shape[1] * weight.shape[2] ** 2)
        new = modulated(weight, x, style, False) + state[f"{block}.torgb.bias"][:, None, None]
        new = clamped(new, clamps.get(f"{block}.torgb"))
        if rgb is not None:
            f = square_filter(state[f"{block}.resample_filter"])
            new = new + upfirdn(rgb, 4 * f, 2, (len(f) + 1) // 2, (len(f) - 2) // 2)
        rgb, resolution = new, 2 * resolution
    return rgb


def random_state(
    channels=(6, 5, 4), z=7, w=5, layers=2, classes=0, image_channels=3, taps=(1, 3, 3, 1), base=4, noise=True, seed=0,
    architecture="skip",
):  # fmt: skip
    """A random generator: names of NVIDIA's layout -> float32 tensors."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    f = torch.tensor(taps, dtype=torch.float32)
    f = f / f.sum()
    f = torch.outer(f, f) if len(taps) < 8 else f  # as there: long filters stay one-dimensional
    state = {}

    def fc(name, out, fan_in, bias=0.0, rate=1.0):
        state[f"{name}.weight"], state[f"{name}.bias"] = rand(out, fan_in) / rate, bias + rand(out) / 9 / rate

    width = z
    if classes:
        fc("mapping.embed", w, classes)
        width += w
    for n in range(layers):
        fc(f"mapping.fc{n}", w, width, rate=0.01)
        width = w
    state["mapping.w_avg"] = rand(w) / 3

    def conv(name, o, i, resolution):
        fc(f"{name}.affine", i, w, bias=1.0)
        state[f"{name}.weight"], state[f"{name}.bias"] = rand(o, i, 3, 3), rand(o) / 5
        if noise:
            state[f"{name}.noise_strength"] = rand(1)[0] / 5
            state[f"{name}.noise_const"] = rand(resolution, resolution)
        state[f"{name}.resample_filter"] = f.clone()

    for level, o in enumerate(channels):
        resolution = base * 2**level
        block = f"synthesis.b{resolution}"
        state[f"{block}.resample_filter"] = f.clone()
        if level:
            conv(f"{block}.conv0", o, channels[level - 1], resolution)
        else:
            state[f"{block}.const"] = rand(o, base, base)
        conv(f"{block}.conv1", o, o, resolution)
        fc(f"{block}.torgb.affine", o, w, bias=1.0)
        state[f"{block}.torgb.weight"] = rand(image_channels, o, 1, 1) / 5
        state[f"{block}.torgb.bias"] = rand(image_channels) / 9
        if level and architecture == "resnet":
            state[f"{block}.skip.weight"] = rand(o, channels[level - 1], 1, 1)
            state[f"{block}.skip.resample_filter"] = f.clone()
    if architecture != "skip":
        last = f"synthesis.b{base * 2 ** (len(channels) - 1)}."
        state = {name: t for name, t in state.items() if ".torgb." not in name or name.startswith(last)}
    return state


# -- pickles -----------------------------------------------------------------------------------------------------------


class Persistent:
    """Pickles as their objects do: a function of torch_utils.persistence, source text, a class name and a state."""

    def __init__(self, class_name, state, source):
        self.class_name, self.state, self.source = class_name, state, source

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name}
        reconstruct = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        return (reconstruct, ({**meta, "state": self.state},), None, None, None)


def module(class_name, source, parameters=None, buffers=None, modules=None, **attributes):
    state = {
        "training": False,
        "_parameters": collections.OrderedDict(parameters or {}),
        "_buffers": collections.OrderedDict(buffers or {}),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": collections.OrderedDict(),
        "_modules": collections.OrderedDict(modules or {}),
        "_init_args": (),
        "_init_kwargs": {},
        **attributes,
    }
    return Persistent(class_name, state, source)


_CLASSES = {"mapping": "MappingNetwork", "synthesis": "SynthesisNetwork", "torgb": "ToRGBLayer", "skip": "Conv2dLayer"}
_BUFFERS = ("resample_filter", "noise_const", "w_avg")


def network(state, source, settings=None):
    """The tree of persistent modules of a generator. settings: dotted name -> more attributes."""
    settings = settings or {}

    def build(prefix, class_name):
        here = {n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)}
        own = {n: t for n, t in here.items() if "." not in n}
        children = list(dict.fromkeys(n.split(".")[0] for n in here if "." in n))
        attributes = {n[len(prefix) :]: v for n, v in settings.items() if n.rpartition(".")[0] + "." == (prefix or ".")}
        return module(
            class_name,
            source,
            {n: torch.nn.Parameter(t) for n, t in own.items() if n not in _BUFFERS},
            {n: t for n, t in own.items() if n in _BUFFERS},
            {child: build(f"{prefix}{child}.", _CLASSES.get(child, "SynthesisLayer")) for child in children},
            **attributes,
        )

    return build("", "Generator")


class EasyDict(dict):
    __module__ = "dnnlib.util"


# -- TensorFlow --------------------------------------------------------------------------------------------------------


class Network:
    """Pickles as the networks of their TensorFlow code do."""

    __module__ = "dnnlib.tflib.network"

    def __init__(self, name, variables, components=None, **settings):
        source = {"build_module_src": "raise SystemExit('ran')", "build_func_name": "G_main"}
        self.__dict__.update(
            version=5, name=name, static_kwargs=EasyDict(settings), components=components or {}, **source,
            variables=variables,
        )  # fmt: skip


def tensorflow_variables(state):
    """A state in NVIDIA's PyTorch layout as TensorFlow's names and layouts, as their converter reads them back."""
    variables, noise = {}, 0
    for name, tensor in state.items():
        array = tensor.numpy()
        parts = name.split(".")
        if name == "mapping.w_avg":
            variables["dlatent_avg"] = array
        elif parts[0] == "mapping":
            layer = "LabelEmbed" if parts[1] == "embed" else f"Dense{parts[1][2:]}"
            variables[f"mapping/{layer}/{parts[2]}"] = array.T if parts[2] == "weight" else array
        elif parts[-1] != "resample_filter":
            size = int(parts[1][1:])
            block, layer = f"synthesis/{size}x{size}", parts[2]
            if layer == "const":
                variables[f"{block}/Const/const"] = array[None]
                continue
            theirs = {"conv0": "Conv0_up", "conv1": "Conv1" if size > 4 else "Conv", "torgb": "ToRGB", "skip": "Skip"}[
                layer
            ]
            if parts[3] == "noise_const":
                variables[f"synthesis/noise{noise}"] = array[None, None]
                noise += 1
            elif parts[3] == "affine":
                new = array.T if parts[4] == "weight" else array - 1
                variables[f"{block}/{theirs}/mod_{parts[4]}"] = new
            elif parts[3] == "weight":
                array = array.transpose(2, 3, 1, 0)
                variables[f"{block}/{theirs}/weight"] = array[::-1, ::-1] if layer == "conv0" else array
            else:
                variables[f"{block}/{theirs}/{parts[3]}"] = array
    return {name: np.ascontiguousarray(array) if array.ndim else np.float32(array) for name, array in variables.items()}


def tensorflow_network(state, **settings):
    """The tree of networks of a StyleGAN2 generator."""
    variables = tensorflow_variables(state)
    part = lambda name: [(n[len(name) + 1 :], v) for n, v in variables.items() if n.startswith(f"{name}/")]  # noqa: E731
    parts = {name: Network(f"G_{name}", part(name), **settings) for name in ("synthesis", "mapping")}
    own = [("lod", np.float32(0)), *((n, v) for n, v in variables.items() if "/" not in n)]
    return Network("Gs", own, parts, **settings)


@contextlib.contextmanager
def their_modules():
    """The names that their pickles refer to, while one is written."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("a persistent object was reconstructed")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    fakes = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
        "dnnlib.tflib": {},
        "dnnlib.tflib.network": {"Network": Network},
    }
    kept = {name: sys.modules.get(name) for name in fakes}
    try:
        for name, content in fakes.items():
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(content)
        yield
    finally:
        for name, old in kept.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def dumps(content, protocol=4):
    with their_modules():
        file = io.BytesIO()
        pickle.Pickler(file, protocol).dump(content)
        return file.getvalue()
