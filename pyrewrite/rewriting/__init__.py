"""Rewriting one layer: selections, directions, solvers and patches."""

from .keys import context_directions, unusual_units
from .patch import LayerUpdate, LowRankPatch, PatchSet, overlap, set_patches, shared_directions, stack
from .report import EditWarning, Report
from .rewriter import Rewriter
from .selection import decode_mask, encode_mask, mask_on_map

__all__ = [
    "EditWarning",
    "LayerUpdate",
    "LowRankPatch",
    "PatchSet",
    "Report",
    "Rewriter",
    "context_directions",
    "decode_mask",
    "encode_mask",
    "mask_on_map",
    "overlap",
    "set_patches",
    "shared_directions",
    "stack",
    "unusual_units",
]
