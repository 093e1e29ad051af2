"""Models whose circuit is known because they were built around it, and published circuits."""

from pahq.truth import canonical, tracr
from pahq.truth.gates import Gate, gate
from pahq.truth.planted import BAND, Planted, plant
from pahq.truth.wiring import wire

__all__ = ["BAND", "Gate", "Planted", "canonical", "gate", "plant", "tracr", "wire"]
