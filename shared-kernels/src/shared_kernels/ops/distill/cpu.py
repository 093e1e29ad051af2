"""Passes over logits in plain torch, in place, over as many rows at a time as a cache holds."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.linalg import vecdot

from shared_kernels.ops.distill import chunks

#: Logits that a CPU passes over at a time.
_BLOCK: Final = 1 << 18


def _blocks(logits: Tensor) -> list[slice]:
    """Return the rows to take at a time; an accelerator takes all of them at once."""
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, _BLOCK // max(1, logits.shape[1]))
    return [slice(low, low + step) for low in range(0, len(logits), max(1, step))]


def _labels(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return which rows have a label, and the labels, 0 where there is none, as a column."""
    labelled = labels != ignore_index
    return labelled, torch.where(labelled, labels, 0)[:, None]


def _exponentials(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``e^x`` and its sum of each row."""
    e = x.exp()
    return e, e.sum(-1)


def distillation_rows(
    student: Tensor,
    slope: Tensor | None,
    teacher: Tensor,
    place: Tensor,
    labels: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
    stats: Tensor,
) -> None:
    """Write each row's statistics and, unless ``slope`` is None, its logits' gradient.

    With s and t less their largest, ``KL = sum q (t - s) / tau - log Z_t + log Z_s``: equal logits
    give 0 exactly, and because both sides make the same operations, so does the gradient.
    """
    for rows in _blocks(student):
        s, t = student[rows], teacher[place[rows]]
        labelled, label = _labels(labels[rows], ignore_index)
        best = t.argmax(-1, keepdim=True)
        peak = s.amax(-1, keepdim=True)
        agreement = s.gather(1, best)[:, 0] == peak[:, 0]
        s -= peak
        t -= t.gather(1, best)
        own = s.gather(1, label)[:, 0]
        plain = plain_sum = None
        if temperature != 1:
            plain, plain_sum = _exponentials(s)
            s /= temperature
            t /= temperature
        p, p_sum = _exponentials(s)
        q, q_sum = _exponentials(t)
        plain_sum = p_sum if plain_sum is None else plain_sum
        lm = torch.where(labelled, plain_sum.log() - own, 0.0)
        entropy = q_sum.log() - vecdot(q, t) / q_sum
        kl = vecdot(q, t.sub_(s)) / q_sum - q_sum.log() + p_sum.log()
        torch.stack([lm, kl, entropy, agreement.to(lm.dtype)], -1, out=stats[rows])
        if slope is None:
            continue
        a, b = lm_weight[rows], kd_weight[rows] * temperature
        q *= (b / q_sum)[:, None]
        if plain is None:
            g = p.mul_(((a + b) / p_sum)[:, None]).sub_(q)
        else:
            g = p.mul_((b / p_sum)[:, None]).sub_(q).add_(plain.mul_((a / plain_sum)[:, None]))
        g.scatter_add_(1, label, torch.where(labelled, -a, 0.0)[:, None])
        slope[rows] = g


def sparse_rows(
    logits: Tensor,
    slope: Tensor | None,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
    tail: bool,
    stats: Tensor,
) -> None:
    """Write each row's statistics and, unless ``slope`` is None, its logits' gradient.

    Off the indices the gradient is ``p_v (m - r / P) = u_v (m P - r)`` with the law u of the tokens
    off them, their mass P, and the teacher's masses r of them and m of all. The logits of the
    indices are taken out of the row first, so that P is a sum of its own and not a difference.
    """
    minus = float("-inf")
    for rows in _blocks(logits):
        s = logits[rows]
        labelled, label = _labels(labels[rows], ignore_index)
        known, token = indices[rows] >= 0, indices[rows].clamp_min(0).long()
        logq = torch.where(known, log_probs[rows], minus)
        q = logq.exp()
        best = token.gather(1, q.argmax(-1, keepdim=True))
        s -= s.amax(-1, keepdim=True)
        agreement = s.gather(1, best)[:, 0] == 0
        own = s.gather(1, label)[:, 0]
        a, b = lm_weight[rows], kd_weight[rows] * temperature
        plain = plain_sum = None
        if temperature != 1:
            plain, plain_sum = _exponentials(s)
            s /= temperature
        on = s.gather(1, token).masked_fill(~known, minus)
        row, column = known.nonzero(as_tuple=True)
        s[row, token[row, column]] = minus
        # relative to their own largest, so that no mass is too small a number
        off_peak = s.amax(-1, keepdim=True)
        empty = off_peak[:, 0] == minus
        off, off_sum = _exponentials(s.sub_(off_peak.masked_fill(empty[:, None], 0.0)))
        log_off = off_sum.log() + off_peak[:, 0]
        lse = torch.logaddexp(log_off, on.logsumexp(-1))
        plain_lse = lse if plain_sum is None else plain_sum.log()
        lm = torch.where(labelled, plain_lse - own, 0.0)
        logp = on - lse[:, None]
        mass, rest = q.sum(-1), torch.zeros_like(lm)
        if tail:
            # nothing is off the indices of a whole vocabulary, whatever the masses round to
            rest = torch.where(empty, 0.0, (1 - mass).clamp_min(0))
            some = rest > 0
            log_rest = torch.where(some, rest, 1.0).log()
            gap = torch.where(some, log_rest - log_off + lse, 0.0)
            kl = torch.where(q > 0, q * (logq - logp), 0.0).sum(-1) + rest * gap
            entropy = -torch.where(q > 0, q * logq, 0.0).sum(-1) - rest * log_rest
            mass = mass + rest
        else:
            kl = -torch.where(q > 0, q * logp, 0.0).sum(-1)
            entropy = torch.zeros_like(lm)
        torch.stack([lm, kl, entropy, agreement.to(lm.dtype)], -1, out=stats[rows])
        if slope is None:
            continue
        share = (log_off - lse).exp()
        level = b * (mass * share - rest)
        slopes = b[:, None] * (mass[:, None] * logp.exp() - q)
        if plain is None:
            level = level + a * share
            slopes = slopes + a[:, None] * logp.exp()
        g = off.mul_((level / torch.where(empty, 1.0, off_sum))[:, None])
        g[row, token[row, column]] = slopes[row, column]
        if plain is not None:
            g += plain.mul_((a / plain_sum)[:, None])
        g.scatter_add_(1, label, torch.where(labelled, -a, 0.0)[:, None])
        slope[rows] = g


def linear_distillation(*args: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute what `reference.linear_distillation` defines, chunk by chunk."""
    return chunks.linear_distillation(distillation_rows, *args)


def sparse_distillation(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `reference.sparse_distillation` defines, chunk by chunk."""
    return chunks.sparse_distillation(sparse_rows, *args)
