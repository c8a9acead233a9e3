"""What a solve leaves in the generator, measured there and not read off the loop."""

from __future__ import annotations

import dataclasses
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

CHANGED = 0.1  # a target counts as changed when its loss fell by this share
NOT_TAKEN = 0.95  # an edit did not take when more than this share of its loss is left
STRAY = 0.02  # a region of a mask smaller than this share of its largest one is taken for stray pixels
CLAMPED = 0.001  # the solvers do not know of a layer's bound, which more than this share of its values meet
TOO_LARGE = 1.0  # ||Delta W|| / ||W0|| beyond which pictures tend to fall apart


class EditWarning(UserWarning):
    """An edit that did not take, or one that is out of proportion."""


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


@dataclass
class Report:
    """The outcome of one solve.

    loss_before, loss_after: L1 between the layer's values and the goal in the pasted boxes, the mean over all targets,
    of the generator without and with the patch. loss_shown: the last loss that the loop itself recorded.
    targets: one dict a target image: image, before, after. context_changed: share of the targets whose loss fell by
    at least 10 %. relative_size: ||Delta W|| / ||W0||. islands: the sizes in pixels of each mask's separate regions,
    where there are several. protected: None, or what became of the protected pixels: `dimensions` of key space that
    the edit may not touch, `left_out`, the part of the protected keys' energy (whitened) outside of them, and `change`,
    the mean change of the layer's values there as a part of their mean size. clamped: share of the edited values in the
    boxes that lie at the bound of a layer that clamps its values (NVIDIA's networks with 16-bit layers). seconds: by
    stage.
    """

    layer: str
    method: str
    rank: int
    steps: int
    loss_before: float
    loss_after: float
    loss_shown: float | None
    context_changed: float
    relative_size: float
    targets: list[dict[str, float]]
    islands: dict[str, list[int]] = field(default_factory=dict)
    protected: dict[str, float] | None = None
    clamped: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def judge(self, warn: bool = True) -> None:
        """Fill `warnings` from the measures and, unless told not to, warn (EditWarning) about each."""
        if self.loss_before > 0 and self.loss_after > NOT_TAKEN * self.loss_before:
            self.warnings.append(
                f"the edit did not take: the loss in the pasted boxes was {self.loss_before:.4g} and is "
                f"{self.loss_after:.4g}; another layer, a higher rank or more context may help"
            )
        elif self.context_changed < 0.5:
            self.warnings.append(f"the edit took in {self.context_changed:.0%} of its target images only")
        if self.relative_size > TOO_LARGE:
            self.warnings.append(
                f"the edit is {self.relative_size:.2g} times as large as the layer's weights: pictures may fall apart; "
                "fewer steps, a smaller learning rate, more preserve or scaled() may help"
            )
        if self.clamped > CLAMPED:
            self.warnings.append(
                f"{self.clamped:.1%} of the edited values lie at the bound to which the layer clamps them: the solver "
                "computes without it, so that they are not the ones it aimed at; a smaller edit may help"
            )
        for what, sizes in self.islands.items():
            strays = [size for size in sizes if size < STRAY * sizes[0]]
            if strays:
                self.warnings.append(
                    f"{what} has {len(strays)} stray regions ({sum(strays)} pixels): they steer the edit too"
                )
        for text in self.warnings if warn else ():
            warnings.warn(text, EditWarning, stacklevel=4)  # where Rewriter's solve, erase or zero was called

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def _taken(self) -> str:
        loss = f"loss in the pasted boxes {self.loss_before:.4f} -> {self.loss_after:.4f}"
        return f"{loss}, changed in {self.context_changed:.0%} of the targets"

    def __str__(self) -> str:
        lines = [
            f"{self.layer}, {self.method}, rank {self.rank}, {len(self.targets)} targets, {self.steps} steps",
            *([self._taken()] if self.targets else []),  # a closed form that removes has none
            f"size {self.relative_size:.3f} of the weights",
            *([_protection(self.protected)] if self.protected else []),
            *(f"warning: {text}" for text in self.warnings),
        ]
        return "\n".join(lines)


def _protection(protected: dict[str, float]) -> str:
    return (
        f"protected: {protected['dimensions']} dimensions, which leave out {protected['left_out']:.0%} of the keys; "
        f"values there changed by {protected['change']:.1%}"
    )
