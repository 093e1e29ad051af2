"""Models whose circuit is known because they were built around it."""

from pahq.truth.gates import Gate, gate
from pahq.truth.planted import BAND, Planted, plant
from pahq.truth.wiring import wire

__all__ = ["BAND", "Gate", "Planted", "gate", "plant", "wire"]
