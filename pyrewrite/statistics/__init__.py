"""Statistics of a layer's keys over many samples: their second moment, quantiles, and searches with a direction."""

from pyrewrite.statistics.cache import StatisticsCache, default_folder
from pyrewrite.statistics.collect import LayerStatistics, batch_size_by_memory, collect
from pyrewrite.statistics.quantiles import UnitQuantiles
from pyrewrite.statistics.search import DirectionScan, match, match_mask, scan_direction, top_images
from pyrewrite.statistics.second_moment import SecondMoment
from pyrewrite.statistics.shards import collect_shared
from pyrewrite.statistics.whitening import EIGENVALUE_CUT, matrix_power

__all__ = [
    "EIGENVALUE_CUT",
    "DirectionScan",
    "LayerStatistics",
    "SecondMoment",
    "StatisticsCache",
    "UnitQuantiles",
    "batch_size_by_memory",
    "collect",
    "collect_shared",
    "default_folder",
    "match",
    "match_mask",
    "matrix_power",
    "scan_direction",
    "top_images",
]
