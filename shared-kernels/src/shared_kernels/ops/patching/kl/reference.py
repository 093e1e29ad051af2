"""Definition of the divergence of laws whose logits differ a little."""

import torch
from torch import Tensor
from torch.nn import functional

#: Tokens that are widened to float64 at a time.
_CHUNK = 8192
#: Logits that are made at a time.
_LOGITS = 1 << 21


def mean_weight(weight: Tensor, law: Tensor) -> Tensor:
    """Return ``sum_v p_v w_v / sum_v p_v`` of each law, summed in float64."""
    parts = zip(law.split(_CHUNK, 1), weight.split(_CHUNK), strict=True)
    total = law.new_zeros(len(law), weight.shape[1], dtype=torch.float64)
    for p, w in parts:
        total = total + p.double() @ w.double()
    return (total / law.sum(1, keepdim=True, dtype=torch.float64)).to(law.dtype)


def excess(t: Tensor) -> Tensor:
    """Return ``e^t - 1 - t``, by its series ``t^2/2 (1 + t/3 (1 + t/4 ...))`` near 0."""
    order = 12 if t.dtype == torch.float64 else 6
    series = 1 + t / order
    for k in range(order - 1, 2, -1):
        series = 1 + t / k * series
    return torch.where(t.abs() < 0.1, t * t / 2 * series, t.expm1() - t)


def divergence(law: Tensor, t: Tensor) -> Tensor:
    """Return ``log sum_v p_v e^t_v`` where ``sum_v p_v t_v = 0``: ``log1p(sum_v p_v excess(t_v))``.

    Above 60 the exponential may be too large a number, so that those terms are added as logarithms.
    """
    far = t > 60
    if not bool(far.any()):
        return torch.log1p((law * excess(t)).sum(-1))
    near = torch.log1p((law * excess(t.masked_fill(far, 0.0))).sum(-1))
    high = (law.log() + t).masked_fill(~far, float("-inf")).logsumexp(-1)
    return torch.where(far.any(-1), torch.logaddexp(near, high), near)


def kl_from_delta(delta: Tensor, weight: Tensor, law: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Return ``KL(p_n || q_mn)`` with ``log q_v = log p_v + s delta_mn . w_v - const``.

    What all logits have in common is taken off before it is multiplied: the mean of the means.
    """
    centre = mean.mean(0)
    matrix = weight.to(delta.dtype) - centre
    bias = (delta * (mean - centre)).sum(-1, keepdim=True)
    # as many rows as have logits that stay in a cache
    size = max(1, _LOGITS // max(1, law.numel()))
    rows = [
        divergence(law, scale * (functional.linear(x, matrix) - b))
        for x, b in zip(delta.split(size), bias.split(size), strict=True)
    ]
    return torch.cat(rows) if rows else delta.new_empty(delta.shape[:2])
