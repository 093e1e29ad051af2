"""Statistics of a model on calibration data, from which its compression is planned."""

from slimmoe.calibration.engine import calibrate
from slimmoe.calibration.statistics import (
    CalibrationStatistics,
    ExpertStatistics,
    LayerCoverage,
    LayerStatistics,
    NormStatistics,
)

__all__ = [
    "CalibrationStatistics",
    "ExpertStatistics",
    "LayerCoverage",
    "LayerStatistics",
    "NormStatistics",
    "calibrate",
]
