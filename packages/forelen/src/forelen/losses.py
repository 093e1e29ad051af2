"""Losses of a head that predicts a distribution over bins of lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import log_softmax

if TYPE_CHECKING:
    from torch import Tensor

    from forelen.binning import Bins


def paper_loss(logits: Tensor, lengths: Tensor, bins: Bins, *, weight: float = 0.95) -> Tensor:
    """Return the paper's loss ``w CE(p, p_hat) + (1 - w) (y - y_hat)^2`` (arXiv:2602.11812).

    The squared term is in tokens squared, so it outweighs the other unless lengths are short.

    Args:
        logits: float ``(N, K)``.
        lengths: ``(N,)``.
        bins: K bins; the labels are `Bins.paper_labels`.
        weight: w.

    Returns:
        ``(N,)``.
    """
    labels = bins.paper_labels(lengths).to(logits.dtype)
    logprobs = log_softmax(logits, -1)
    predicted = logprobs.exp() @ bins.centers().to(logits)
    cross = -(labels * logprobs).sum(-1)
    return weight * cross + (1 - weight) * (lengths.to(logits.dtype) - predicted) ** 2


def forelen_loss(
    logits: Tensor,
    lengths: Tensor,
    bins: Bins,
    *,
    censored: Tensor | None = None,
    weight: float = 0.95,
) -> Tensor:
    """Return a loss whose two terms have one unit, and that learns from answers cut short.

    ``w CE(p, p_hat) + (1 - w) RPS`` with `Bins.labels`, whose mean is the length, and the ranked
    probability score ``sum_j (P^(L <= e_j) - P(L <= e_j))^2`` over the bins' upper edges: the mean
    pinball loss of all quantiles, up to a factor, counted in bins. An answer that was stopped after
    c tokens says only that its length is more: ``-log P(L > c)``.

    Args:
        logits: float ``(N, K)``.
        lengths: ``(N,)``, tokens seen.
        bins: K bins.
        censored: bool ``(N,)``, which answers were stopped.
        weight: w.

    Returns:
        ``(N,)``.
    """
    logprobs = log_softmax(logits, -1)
    labels = bins.labels(lengths).to(logits.dtype)
    cross = -(labels * logprobs).sum(-1)
    gaps = (logprobs.exp() - labels).cumsum(-1)
    loss = weight * cross + (1 - weight) * (gaps**2).sum(-1)
    if censored is None:
        return loss
    above = (1 - bins.below(lengths)).to(logits.dtype)
    # a closed last bin says nothing of what lies beyond it
    lost = above.sum(-1, keepdim=True) == 0
    above = torch.where(lost, torch.nn.functional.one_hot(
        torch.full_like(bins.index(lengths), len(bins) - 1), len(bins)
    ).to(above), above)  # fmt: skip
    tail = torch.logsumexp(logprobs + above.log(), -1)
    return torch.where(censored, -tail, loss)
