"""Definitions of sums over segments of rows, in float64.

A segment is ``count`` consecutive rows; segments follow one another. Rows that ``keep`` leaves out
count nowhere. All sums are added to what the outputs hold.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

#: Of more numbers than these, copies in another dtype are made of so many at a time as a cache
#: holds: memory that is new to the process costs ten times what the sums do.
_MOST, _BLOCK = 1 << 19, 1 << 18


def wide(x: Tensor) -> Tensor:
    """Return 16-bit numbers in float32, others as they are."""
    return x.float() if x.dtype.itemsize < 4 else x


def _step(rows: int, width: int) -> int:
    """Rows that copies are made of at a time."""
    return max(1, rows if rows * width <= _MOST else _BLOCK // width)


def _kept(
    counts: Tensor, keep: Tensor | None, rows: list[Tensor]
) -> tuple[Tensor, list[int], list[Tensor]]:
    """Return counts, bounds and rows, without the rows that do not count."""
    if keep is not None:
        segment = torch.repeat_interleave(counts)[keep]
        counts = torch.bincount(segment, minlength=len(counts))
        rows = [part[keep] for part in rows]
    return counts, [0, *counts.cumsum(0).tolist()], rows


def _value(x: Tensor, kind: str) -> Tensor:
    if kind == "abs":
        return x.abs()
    return wide(x).square() if kind == "square" else x


def _sums(x: Tensor, ends: list[int], kind: str) -> Tensor:
    """Return ``sum_i f(x_i)`` of each segment: f is x, ``|x|`` or ``x^2``."""
    total = x.new_zeros(len(ends) - 1, x.shape[1], dtype=torch.float64)
    for row, (low, high) in zip(total, pairwise(ends), strict=True):
        step = _step(high - low, x.shape[1])
        part = _value(x[low : min(low + step, high)], kind)
        torch.sum(part, 0, dtype=torch.float64, out=row)
        for at in range(low + step, high, step):
            row += _value(x[at : min(at + step, high)], kind).sum(0, dtype=torch.float64)
    return total


def segment_sums_(
    x: Tensor, counts: Tensor | None, keep: Tensor | None, out: Tensor, kind: str
) -> None:
    """Add ``sum_i f(x_i)`` over the rows of each segment: f is x, ``|x|`` or ``x^2``."""
    if counts is None:
        x = x if keep is None else x[keep]
        ends = [0, len(x)]
    else:
        _, ends, (x,) = _kept(counts, keep, [x])
    out += _sums(x, ends, kind)


def norm_sums_(x: Tensor, y: Tensor, keep: Tensor | None, square: Tensor, absolute: Tensor) -> None:
    """Add ``sum_i x_i^2`` and ``sum_i |y_i|`` over all rows."""
    segment_sums_(x, None, keep, square[None], "square")
    segment_sums_(y, None, keep, absolute[None], "abs")


def assignment_sums_(
    output: Tensor,
    weight: Tensor,
    share: Tensor,
    counts: Tensor,
    keep: Tensor | None,
    output_sum: Tensor,
    columns: Tensor,
) -> None:
    """Add ``sum y`` and ``sum (1, w, s, |y|, w |y|)`` of each segment; keep the largest ``|y|``."""
    counts, ends, (output, weight, share) = _kept(counts, keep, [output, weight, share])
    blocks = output.split(_step(*output.shape)) if output.dtype.itemsize < 4 else [output]
    norms = [torch.linalg.vector_norm(wide(block), dim=-1) for block in blocks]
    norm, w, s = (x.double() for x in (torch.cat(norms), weight, share))
    output_sum += _sums(output, ends, "sum")
    columns[:, 0] += counts
    columns[:, 1:5] += _sums(torch.stack([w, s, norm, w * norm], -1), ends, "sum")
    columns[:, 5].scatter_reduce_(0, torch.repeat_interleave(counts), norm, "amax")
