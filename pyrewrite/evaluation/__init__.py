"""Judging edits: attributes of the demo pictures, change inside and outside the edited region, contact sheets."""

from pyrewrite.evaluation.change import (
    EditReport,
    ImageChange,
    RegionChange,
    RegionDistance,
    edit_report,
    image_change,
    region_distance,
    ssim_map,
)
from pyrewrite.evaluation.classifier import ATTRIBUTES, AttributeClassifier
from pyrewrite.evaluation.peeps import peeps_attributes
from pyrewrite.evaluation.sheets import contact_sheet, save_image, to_uint8

__all__ = [
    "ATTRIBUTES",
    "AttributeClassifier",
    "EditReport",
    "ImageChange",
    "RegionChange",
    "RegionDistance",
    "contact_sheet",
    "edit_report",
    "image_change",
    "peeps_attributes",
    "region_distance",
    "save_image",
    "ssim_map",
    "to_uint8",
]
