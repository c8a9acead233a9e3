"""Low-rank patches: an edit as factors, put into a generator and taken out again without a trace.

A generator carries a set of patches. Its weight is always W0 + the sum of the active ones, recomputed from the kept
W0, so patches come off in any order and the last one off restores the original bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .._files import write_atomically
from .._finite import all_finite
from ..errors import PatchError
from ..generators import Generator

FORMAT = "pyrewrite-patch"
FORMAT_VERSION = "1"

# Applying and removing recompute weights in place: one at a time, whichever thread asks. To render the original and
# the edited generator at the same time, give each thread its own copy.deepcopy of the generator.
_lock = threading.RLock()


@dataclass(frozen=True)
class LayerUpdate:
    """The change of one layer, Delta W[o, i, y, x] = sum_d Lambda[o, d, y, x] D[d, i].

    direction: D, r x I float32. lambda_: Lambda, O x r x kh x kw float32.
    """

    layer: str
    direction: Tensor
    lambda_: Tensor

    def __post_init__(self) -> None:
        direction, lambda_ = self.direction, self.lambda_
        if direction.ndim != 2 or lambda_.ndim != 4 or lambda_.shape[1] != direction.shape[0]:
            raise PatchError(
                f"{self.layer}: direction {tuple(direction.shape)} and lambda {tuple(lambda_.shape)}; "
                "expected r x I and O x r x kh x kw"
            )
        for name, tensor in (("direction", direction), ("lambda", lambda_)):
            if tensor.dtype != torch.float32:
                raise PatchError(f"{self.layer}: {name} is {tensor.dtype}; expected float32")
            if not all_finite(tensor):
                raise PatchError(f"{self.layer}: {name} holds values that are not finite")

    @property
    def rank(self) -> int:
        return self.direction.shape[0]

    def delta(self) -> Tensor:
        """Delta W, O x I x kh x kw float64."""
        return torch.einsum("odyx,di->oiyx", self.lambda_.double(), self.direction.double())


class LowRankPatch:
    """A change of one or several layers, with what is needed to know where it belongs.

    updates: one LayerUpdate a layer. generator: {"family", "hash"} of the generator it was made for, or None.
    settings, report, edit: JSON-ready data about its making.
    """

    def __init__(
        self,
        updates: Sequence[LayerUpdate],
        *,
        name: str | None = None,
        generator: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        report: Any = None,
    ) -> None:
        if not updates:
            raise PatchError("a patch needs the update of at least one layer")
        layers = [u.layer for u in updates]
        if len(set(layers)) < len(layers):
            raise PatchError(f"a patch holds one update a layer, got {', '.join(layers)}")
        self.updates = tuple(updates)
        self.name = name
        self.generator = generator
        self.settings = settings or {}
        self.report = report
        self.overlap: dict[str, Any] | None = None

    def __repr__(self) -> str:
        parts = ", ".join(f"{u.layer} rank {u.rank}" for u in self.updates)
        return f"<LowRankPatch {self.name or ''} {parts}>"

    @property
    def digest(self) -> str:
        """sha256 over layers and factors: two patches with the same digest are the same change."""
        digest = hashlib.sha256()
        for update in sorted(self.updates, key=lambda u: u.layer):
            digest.update(update.layer.encode())
            for tensor in (update.direction, update.lambda_):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def scaled(self, strength: float) -> LowRankPatch:
        """The same change times `strength`: 0 leaves the original bits, 1 is the patch."""
        if not -1e6 < strength < 1e6:
            raise PatchError(f"strength is {strength!r}; expected a finite number")
        updates = [LayerUpdate(u.layer, u.direction, u.lambda_ * strength) for u in self.updates]
        settings = {**self.settings, "strength": strength * self.settings.get("strength", 1.0)}
        return LowRankPatch(updates, name=self.name, generator=self.generator, settings=settings, report=self.report)

    def apply_(self, generator: Generator, *, force: bool = False) -> LowRankPatch:
        """Put the patch into the generator's weights, in place.

        Raises PatchError, with the generator as it was, when the generator is not the one the patch was made for
        (unless `force`), a layer is missing or of another shape, or the patch is active already.
        """
        with _lock:
            patches = generator.patches or PatchSet(generator.weights_hash())
            patches.check(generator)
            made_for = (self.generator or {}).get("hash")
            if made_for is not None and made_for != patches.original_hash and not force:
                raise PatchError(
                    f"the patch was made for a {self.generator.get('family', 'generator')} with weights "
                    f"{made_for[:12]}..., this {generator.family} has {patches.original_hash[:12]}...: "
                    "force=True (--force) applies it all the same"
                )
            for update in self.updates:
                _check_fits(update, generator)
            if any(p.digest == self.digest for p in patches.active):
                raise PatchError(f"{self!r} is active already: applying it twice is refused; scaled() changes strength")
            patches.add(generator, self)
            generator.patches = patches
        return self

    def remove_(self, generator: Generator) -> LowRankPatch:
        """Take the patch out again; the last one out restores the original bits. PatchError when it is not active."""
        with _lock:
            patches = generator.patches
            active = [p for p in patches.active if p.digest == self.digest] if patches else []
            if not active:
                raise PatchError(f"{self!r} is not active on this generator")
            patches.check(generator)
            patches.discard(generator, active[0])
            if not patches.active:
                generator.patches = None
        return self

    @contextlib.contextmanager
    def applied(self, generator: Generator, *, force: bool = False) -> Iterator[Generator]:
        """`with patch.applied(g):` the generator is edited inside the block and as before after it."""
        self.apply_(generator, force=force)
        try:
            yield generator
        finally:
            self.remove_(generator)

    def to_bytes(self) -> bytes:
        """A .safetensors file with the factors and their metadata."""
        tensors = {}
        for update in self.updates:
            # clone: safetensors refuses tensors that share memory, and the file must hold each on its own
            tensors[f"{update.layer}.direction"] = update.direction.detach().cpu().clone().contiguous()
            tensors[f"{update.layer}.lambda"] = update.lambda_.detach().cpu().clone().contiguous()
        report = self.report.to_dict() if hasattr(self.report, "to_dict") else self.report
        metadata = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "name": self.name or "",
            "layers": json.dumps([u.layer for u in self.updates]),
            "generator": json.dumps(self.generator),
            "settings": json.dumps(self.settings),
            "report": json.dumps(report),
        }
        return safetensors.torch.save(tensors, metadata=metadata)

    def save(self, path: str | Path) -> None:
        """Write `to_bytes` to a file, whole or not at all."""
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> LowRankPatch:
        """Read a file written by save. PatchError names the file and what is wrong with it."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such patch file")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PatchError(f"{path}: cannot be read ({error})") from error
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "patch") -> LowRankPatch:
        """The inverse of `to_bytes`; PatchError names `source` and what is wrong with it."""
        try:
            tensors = safetensors.torch.load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise PatchError(f"{source}: not a .safetensors file, or cut off ({error!s:.200})") from error
        if metadata.get("format") != FORMAT:
            raise PatchError(f"{source}: a .safetensors file, but not a patch (metadata 'format' is not {FORMAT!r})")
        if metadata.get("version") != FORMAT_VERSION:
            raise PatchError(
                f"{source}: patch version {metadata.get('version')!r}; this release reads {FORMAT_VERSION}"
            )
        try:
            layers = json.loads(metadata["layers"])
            fields = {k: json.loads(metadata.get(k, "null")) for k in ("generator", "settings", "report")}
            if not isinstance(layers, list) or not all(isinstance(n, str) for n in layers):
                raise PatchError(f"layers are {layers!r:.60}; expected a list of names")
            for name, value in fields.items():
                if value is not None and not isinstance(value, dict):
                    raise PatchError(f"{name} is {value!r:.60}; expected an object or null")
            if not all(isinstance(value, str) for value in (fields["generator"] or {}).values()):
                raise PatchError(f"generator is {fields['generator']!r:.60}; expected its family and its hash")
            strength = (fields["settings"] or {}).get("strength", 1.0)
            if isinstance(strength, bool) or not isinstance(strength, (int, float)):
                raise PatchError(f"strength is {strength!r:.60}; expected a number")
            updates = [LayerUpdate(n, tensors[f"{n}.direction"], tensors[f"{n}.lambda"]) for n in layers]
        except PatchError as error:
            raise PatchError(f"{source}: {error}") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise PatchError(f"{source}: damaged metadata or factors missing ({error!s:.200})") from error
        return cls(updates, name=metadata.get("name") or None, **fields)


@dataclass
class PatchSet:
    """The patches that are active on one generator, and the weights without them (layer -> W0, flat shape kept)."""

    original_hash: str
    original: dict[str, Tensor] = field(default_factory=dict)
    active: list[LowRankPatch] = field(default_factory=list)

    def add(self, generator: Generator, patch: LowRankPatch) -> None:
        for update in patch.updates:
            if update.layer not in self.original:
                self.original[update.layer] = generator.layers[update.layer].weight.detach().clone()
        self._set_active(generator, [*self.active, patch], patch)

    def discard(self, generator: Generator, patch: LowRankPatch) -> None:
        self._set_active(generator, [p for p in self.active if p is not patch], patch)
        touched = {u.layer for p in self.active for u in p.updates}
        for layer in [name for name in self.original if name not in touched]:
            del self.original[layer]

    def replace(self, generator: Generator, active: Sequence[LowRankPatch]) -> None:
        """Make `active`, in that order, the active patches: all of it or, on an error, none of it."""
        before, kept = self.active, dict(self.original)
        touched = list(dict.fromkeys(u.layer for p in [*before, *active] for u in p.updates))
        try:
            for layer in touched:
                if layer not in self.original:
                    self.original[layer] = generator.layers[layer].weight.detach().clone()
            self.active = list(active)
            self._write_layers(generator, touched)
        except BaseException:
            self.active = before
            self._write_layers(generator, [layer for layer in touched if layer in self.original])
            self.original = kept
            raise
        used = {u.layer for p in active for u in p.updates}
        self.original = {layer: weight for layer, weight in self.original.items() if layer in used}

    def _set_active(self, generator: Generator, active: list[LowRankPatch], changed: LowRankPatch) -> None:
        """Make `active` the active patches and write the layers of `changed`: all of it or, on an error, none of it."""
        before, self.active = self.active, active
        try:
            self._write(generator, changed)
        except BaseException:
            self.active = before
            self._write(generator, changed)
            raise

    def check(self, generator: Generator) -> None:
        """PatchError when something else changed a patched layer's weights: recomputing would lose that change."""
        for layer in self.original:
            weight = generator.layers[layer].weight
            if not torch.equal(self.weight(layer).to(weight.device), weight.detach()):
                raise PatchError(
                    f"the weights of {layer} are not what its {len(self.active)} active patches left there: "
                    "something else changed them"
                )

    def weight(self, layer: str) -> Tensor:
        """W0 + the sum of the active patches on a layer, in W0's shape and dtype. Zero updates keep W0's bits."""
        original = self.original[layer]
        updates = [u for p in self.active for u in p.updates if u.layer == layer and bool(u.lambda_.any())]
        if not updates:
            return original
        total = sum(u.delta().to(original.device) for u in updates)  # O x I x kh x kw float64
        return (original.double() + total.view(original.shape)).to(original.dtype)

    def _write(self, generator: Generator, patch: LowRankPatch) -> None:
        self._write_layers(generator, [update.layer for update in patch.updates])

    def _write_layers(self, generator: Generator, layers: Sequence[str]) -> None:
        with torch.no_grad():
            for layer in layers:
                generator.layers[layer].weight.copy_(self.weight(layer))


def set_patches(generator: Generator, patches: Sequence[LowRankPatch]) -> None:
    """Make exactly `patches`, summed in that order, the active ones: the same list always leaves the same bits.

    Raises PatchError, with the generator as it was, for a patch that does not fit, one that is in the list twice, or
    weights that something else has changed.
    """
    with _lock:
        active = generator.patches or PatchSet(generator.weights_hash())
        active.check(generator)
        for patch in patches:
            for update in patch.updates:
                _check_fits(update, generator)
        if len({p.digest for p in patches}) < len(patches):
            raise PatchError("a patch is in the list twice: applying one twice is refused")
        active.replace(generator, patches)
        generator.patches = active if active.active else None


def _check_fits(update: LayerUpdate, generator: Generator) -> None:
    if update.layer not in generator.layers:
        raise PatchError(f"the patch changes {update.layer!r}; this generator has {', '.join(generator.layers)}")
    weight = generator.layers[update.layer].weight
    shape = tuple(weight.shape[-4:])  # O x I x kh x kw
    expected = (update.lambda_.shape[0], update.direction.shape[1], *update.lambda_.shape[2:])
    if shape != expected:
        raise PatchError(f"the patch changes a {expected} weight of {update.layer}; this generator's is {shape}")


def overlap(a: LowRankPatch, b: LowRankPatch) -> float:
    """How much two patches meet: the cosine between their changes over the layers both touch, in [-1, 1].

    0: they do not disturb each other. Near 1: they are the same change. Near -1: each undoes the other.
    """
    deltas = {u.layer: u.delta() for u in a.updates}
    product = sum(
        float((delta * u.delta().to(delta.device)).sum())
        for u in b.updates
        if (delta := deltas.get(u.layer)) is not None
    )
    norms = [sum(float(u.delta().square().sum()) for u in p.updates) ** 0.5 for p in (a, b)]
    return product / (norms[0] * norms[1]) if min(norms) > 0 else 0.0


def shared_directions(a: LowRankPatch, b: LowRankPatch) -> float:
    """The share of the smaller direction space that lies in the other, in [0, 1], over the layers both touch."""
    spaces = {u.layer: torch.linalg.qr(u.direction.double().t()).Q for u in a.updates}  # I x r
    shared = [
        float((spaces[u.layer].t() @ torch.linalg.qr(u.direction.to(spaces[u.layer]).t()).Q).square().sum())
        / min(spaces[u.layer].shape[1], u.rank)
        for u in b.updates
        if u.layer in spaces
    ]
    return max(shared, default=0.0)


def stack(patches: Sequence[LowRankPatch], *, warn_above: float = 0.25) -> LowRankPatch:
    """The sum of several patches as one; `.overlap` says how much each pair meets.

    Edits that overlap much are better solved together: `Rewriter.solve([edit, edit])`. A pair whose directions
    overlap by more than `warn_above` gives a UserWarning. PatchError when they belong to different generators.
    """
    patches = list(patches)
    if not patches:
        raise PatchError("stack needs at least one patch")
    hashes = {p.generator["hash"] for p in patches if p.generator and "hash" in p.generator}
    if len(hashes) > 1:
        raise PatchError("the patches were made for different generators: " + ", ".join(h[:12] for h in sorted(hashes)))
    layers = list(dict.fromkeys(u.layer for p in patches for u in p.updates))
    updates = []
    for layer in layers:
        parts = [u for p in patches for u in p.updates if u.layer == layer]
        shapes = {(u.lambda_.shape[0], u.direction.shape[1], *u.lambda_.shape[2:]) for u in parts}
        if len(shapes) > 1:
            raise PatchError(f"the patches change {layer} weights of different shapes: {sorted(shapes)}")
        device = parts[0].direction.device  # a patch that was loaded is on the processor, others may be elsewhere
        direction = torch.cat([u.direction.to(device) for u in parts])
        updates.append(LayerUpdate(layer, direction, torch.cat([u.lambda_.to(device) for u in parts], 1)))
    total = LowRankPatch(
        updates,
        name=" + ".join(p.name or "patch" for p in patches),
        generator=next((p.generator for p in patches if p.generator), None),
        settings={"stacked": [p.settings for p in patches]},
    )
    pairs = [(i, j) for i in range(len(patches)) for j in range(i)]
    total.overlap = {
        f"{patches[j].name or j} / {patches[i].name or i}": {
            "cosine": overlap(patches[j], patches[i]),
            "shared_directions": shared_directions(patches[j], patches[i]),
        }
        for i, j in pairs
    }
    for pair, values in total.overlap.items():
        if values["shared_directions"] > warn_above:
            warnings.warn(
                f"{pair}: {values['shared_directions']:.0%} of the directions are shared; "
                "solved together (Rewriter.solve with both edits) they disturb each other less",
                stacklevel=2,
            )
    return total
