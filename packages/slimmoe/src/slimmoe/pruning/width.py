"""Which channels of the residual stream are kept (arXiv:2605.08738, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slimmoe.pruning.experts import largest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from slimmoe.calibration.statistics import NormStatistics


def channels(norms: Mapping[str, NormStatistics], kept: int) -> list[int]:
    """Return channels whose mean size behind norms is largest, in their order.

    Args:
        norms: Of the residual stream; all count alike.
        kept: How many.
    """
    sizes = [found.output_abs_sum / found.tokens for found in norms.values()]
    return largest(torch.stack(sizes).mean(0), kept)


def correction(found: NormStatistics, kept: Sequence[int]) -> float:
    """Return what a norm is to be multiplied by, so that kept channels have the size they had.

    A root mean square over kept channels alone is another one: with the share rho of the sum of
    squares that these have, it is ``sqrt(rho D / D_t)`` times that of all.

    Args:
        found: Of the norm.
        kept: Channels.
    """
    squares: Tensor = found.input_square_sum.double()
    whole = float(squares.sum())
    if not whole:
        return 1.0
    share = float(squares[list(kept)].sum()) / whole
    return (share * len(squares) / len(kept)) ** 0.5
