"""Definitions of softmax-weighted means and of a prediction after each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

#: Tokens whose weighted states exist at a time.
_CHUNK = 4096


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shrink(low: Tensor, high: Tensor) -> Tensor:
    """Return ``e^(low - high)`` for low <= high, 0 where low is -inf."""
    return torch.where(low == float("-inf"), 0.0, (low - high).exp())


def merge(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over the tokens of both: ``m = max m_i``, ``s = sum_i s_i e^(m_i - m)``."""
    peak = torch.maximum(a[0], b[0])
    mine, theirs = _shrink(a[0], peak), _shrink(b[0], peak)
    return (
        peak,
        a[1] * mine + b[1] * theirs,
        a[2] * mine[..., None] + b[2] * theirs[..., None],
    )


def segment_sums(
    hidden: Tensor, score: Tensor, cu_seqlens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum ``e^(score - m)`` and ``e^(score - m) h`` over the tokens of each segment.

    ``m`` is the largest score of the segment; tokens outside the mask are never read.
    """
    dtype = accumulate_dtype(hidden.dtype)
    count = cu_seqlens.shape[0] - 1
    peak = hidden.new_full((count,), float("-inf"), dtype=dtype)
    total = hidden.new_zeros(count, dtype=dtype)
    weighted = hidden.new_zeros(count, hidden.shape[1], dtype=dtype)
    segments = torch.repeat_interleave(cu_seqlens.diff())
    for low in range(0, score.shape[0], _CHUNK):
        part = mask[low : low + _CHUNK].nonzero()[:, 0] + low
        where, s = segments[part], score[part].to(dtype)
        higher = peak.scatter_reduce(0, where, s, "amax")
        shrink = _shrink(peak, higher)
        weights = _shrink(s, higher[where])
        total = (total * shrink).index_add(0, where, weights)
        states = hidden[part].to(dtype) * weights[:, None]
        weighted = (weighted * shrink[:, None]).index_add(0, where, states)
        peak = higher
    return peak, total, weighted


def plp_update_(
    peak: Tensor,
    total: Tensor,
    weighted: Tensor,
    hidden: Tensor,
    score: Tensor,
    numbers: Tensor,
    active: Tensor,
    features: Tensor,
) -> None:
    """Add a token to the sums of each active row, and write ``[mean ; h ; numbers]``."""
    one = (score.to(peak.dtype), torch.ones_like(total), hidden.to(weighted.dtype))
    new = merge((peak, total, weighted), one)
    for old, value in zip((peak, total, weighted), new, strict=True):
        keep = active if old.dim() == 1 else active[:, None]
        old.copy_(torch.where(keep, value, old))
    mean = weighted / torch.where(total > 0, total, 1.0)[:, None]
    row = torch.cat([mean, hidden.to(mean.dtype), numbers.to(mean.dtype)], -1)
    features.copy_(torch.where(active[:, None], row.to(features.dtype), features))


def plp_output(
    inner: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Return ``softmax(W relu(LayerNorm(inner)) + b)``."""
    dtype = accumulate_dtype(inner.dtype)
    x = layer_norm(inner.to(dtype), inner.shape[-1:], gain.to(dtype), shift.to(dtype), eps)
    return torch.softmax(x.relu() @ weight.to(dtype).T + bias.to(dtype), -1)
