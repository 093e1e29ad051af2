"""Definitions of the steps between the matrix products of a perturbed run, held as differences."""

from __future__ import annotations

import itertools
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

FP8: Final = torch.float8_e4m3fn
FP8_LARGEST: Final = 448.0
#: Below the smallest normal number a scale would be too coarse: codes would exceed the largest one.
SMALLEST_SCALE: Final = torch.finfo(torch.float32).tiny


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 if one of these is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def rounded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round values ``(..., D)``; fp8 has a scale for each token, other dtypes have none, ``(0,)``.

    ``scale = max |value| / 448``, 1 where all are 0; a code is the nearest to ``value / scale``.
    """
    if dtype != FP8:
        return values.to(dtype), values.new_empty(0, dtype=torch.float32)
    values = values.float()
    largest = values.abs().amax(-1, keepdim=True)
    # by a tensor: division of a CUDA tensor by a number multiplies by its rounded inverse
    scale = (largest / torch.full_like(largest, FP8_LARGEST)).clamp(min=SMALLEST_SCALE)
    scale = torch.where(largest == 0, 1.0, scale)
    return (values / scale).to(FP8), scale[..., 0]


def norm_difference(x: Tensor, a: Tensor, weight: Tensor | None, kind: str, eps: float) -> Tensor:
    """Return ``Norm(x + a) - Norm(x)`` with errors in proportion to ``a``.

    With the roots ``s`` of ``mean(x^2) + eps`` and ``s'`` of ``mean((x + a)^2) + eps`` it is
    ``a / s + (x + a) (1 / s' - 1 / s)``, where the last difference is
    ``-mean(a (2 x + a)) / (s s' (s + s'))``.
    """
    if kind == "none":
        return a
    if kind == "layer":
        x, a = x - x.mean(-1, keepdim=True), a - a.mean(-1, keepdim=True)
    whole = x + a
    root = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    moved = (whole.square().mean(-1, keepdim=True) + eps).sqrt()
    grown = (a * (2 * x + a)).mean(-1, keepdim=True)
    result = a * (1 / root) + whole * (-grown / (root * moved * (root + moved)))
    return result if weight is None else result * weight


def combine_norm(
    x: Tensor,
    wide: Tensor,
    narrow: Tensor,
    offsets: Tensor,
    entries: Tensor,
    at: Tensor | None,
    weight: Tensor | None,
    kind: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the rounded norm difference of every receiver for the sum of its senders' deltas."""
    sums = accumulate_dtype(x.dtype, wide.dtype, dtype)
    a = x.new_zeros(x.shape[0], wide.shape[1], *x.shape[1:], dtype=sums)
    bounds, chosen = offsets.tolist(), entries.tolist()
    for group, (low, high) in enumerate(itertools.pairwise(bounds)):
        for entry in chosen[low:high]:
            if entry < 0:
                a[group] += narrow[-1 - entry]
            else:
                a[group] += wide[entry] if at is None else wide[entry][:, at]
    return rounded(norm_difference(x[:, None].to(sums), a, weight, kind, eps), dtype)


def prefix_norm(
    x: Tensor,
    differences: Tensor,
    picked: Tensor,
    drop: Tensor,
    start: Tensor | None,
    at: Tensor | None,
    weight: Tensor | None,
    kind: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the rounded norm difference of every row of a sequence of trials.

    Row m lacks the differences of the dropped rows before it, and its own.
    """
    sums = accumulate_dtype(x.dtype, differences.dtype, dtype)
    total = torch.zeros_like(x, dtype=sums) if start is None else start.to(sums)
    a = x.new_empty(len(picked), *x.shape, dtype=sums)
    for row, (slot, dropped) in enumerate(zip(picked.tolist(), drop.tolist(), strict=True)):
        own = differences[slot] if at is None else differences[slot][at]
        a[row] = total - own
        total = a[row] if dropped else total
    return rounded(norm_difference(x.to(sums), a, weight, kind, eps), dtype)


def activation(h: Tensor, act: str) -> Tensor:
    """Return the activation of ``h``."""
    if act == "silu":
        return F.silu(h)
    if act == "relu":
        return F.relu(h)
    return F.gelu(h, approximate="tanh" if act == "gelu_tanh" else "none")


def activation_delta(
    moved: Tensor, base: Tensor, act: str, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the rounded change of ``act(h)``, or of ``act(g) u``, for ``[g | u]`` side by side.

    ``act(g') u' - act(g) u = (act(g') - act(g)) u' + act(g) (u' - u)``.
    """
    sums = accumulate_dtype(moved.dtype, base.dtype, dtype)
    moved, base = moved.to(sums), base.to(sums)
    if not gated:
        return rounded(activation(base + moved, act) - activation(base, act), dtype)
    (gate, up), (gate_moved, up_moved) = base.chunk(2, -1), moved.chunk(2, -1)
    old = activation(gate, act)
    change = activation(gate + gate_moved, act) - old
    return rounded(change * (up + up_moved) + old * up_moved, dtype)
