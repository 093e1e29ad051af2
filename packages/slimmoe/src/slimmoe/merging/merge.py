"""Averages of experts' weights, and the order of their neurons before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def average(parts: Sequence[Callable[[], Tensor]], weights: Sequence[float]) -> Tensor:
    """Return a weighted average, in float32 at least, rounded once.

    Args:
        parts: Give what is averaged, one after the other, each with the same shape and dtype.
        weights: Of them.
    """
    first = parts[0]()
    if len(parts) == 1:
        return first
    dtype = torch.promote_types(first.dtype, torch.float32)
    total = first.to(dtype) * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part().to(dtype), alpha=weight)
    return total.to(first.dtype)


def alignment(base: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return the order of an expert's neurons that is most like another's.

    Of all orders it is the one with the largest sum of products of what belongs to a neuron: rows
    of the gate and of what it multiplies, columns of what is written (Hungarian algorithm).

    Args:
        base: Matrices ``(I, ...)`` of the expert whose order counts, one row for each neuron.
        other: Of the one to be ordered.

    Returns:
        Numbers ``(I,)`` by which the other's neurons are to be indexed.
    """
    from scipy.optimize import linear_sum_assignment

    gain = sum(a.flatten(1).double() @ b.flatten(1).double().T
               for a, b in zip(base, other, strict=True))  # fmt: skip
    assert isinstance(gain, torch.Tensor)
    _, order = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(order)
