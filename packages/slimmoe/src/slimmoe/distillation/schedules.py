"""Weights of losses over a run (arXiv:2605.08738, section 4.1)."""

from __future__ import annotations

import math


def linear(share: float, begin: float, end: float) -> float:
    """Return a weight that moves evenly: of distillation, ``1 - 0.25 u`` in the paper.

    Args:
        share: Of the run that is over, u, from 0 to 1.
        begin: At 0.
        end: At 1.
    """
    return begin + (end - begin) * share


def cosine(share: float, begin: float, end: float) -> float:
    """Return a weight on half a cosine: of MTP, ``0.1 + 0.2 (1 + cos(pi u)) / 2`` in the paper."""
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2
