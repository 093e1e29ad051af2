"""Definitions of the distillation losses, differentiable by autograd, and their gradients.

With ``q = softmax(t / tau)`` of the teacher and ``p = softmax(s / tau)`` of the student, a row's
loss is ``a LM + b tau^2 CE`` with ``LM = lse(s) - s_y`` and ``CE = -sum_v q_v log p_v = KL + H(q)``
(arXiv:2605.08738, the losses of its section on distillation, where tau is 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: A row's statistics, in this order.
STATISTICS = ("lm", "kl", "entropy", "agreement")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, sums, statistics and of gradients before their last rounding."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plogp(logp: Tensor) -> Tensor:
    """Return ``p log p``, 0 where p is 0."""
    p = logp.exp()
    return torch.where(p == 0, 0.0, p * logp)


def lm_terms(student: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return ``lse(s) - s_y`` of each row, 0 where there is no label."""
    labelled = labels != ignore_index
    picked = student.gather(1, torch.where(labelled, labels, 0)[:, None])[:, 0]
    return torch.where(labelled, student.logsumexp(-1) - picked, 0.0)


def row_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    """Return ``(N, 4)``: LM, ``KL(q || p)``, ``H(q)`` and agreement of each row.

    Agreement is 1 where the teacher's best token, of equal ones the lowest, has the student's
    largest logit.
    """
    logp = torch.log_softmax(student / temperature, -1)
    logq = torch.log_softmax(teacher / temperature, -1)
    q = logq.exp()
    kl = torch.where(q == 0, 0.0, q * (logq - logp)).sum(-1)
    best = student.gather(1, teacher.argmax(-1, keepdim=True))[:, 0]
    agreement = (best == student.amax(-1)).to(student.dtype)
    lm = lm_terms(student, labels, ignore_index)
    return torch.stack([lm, kl, -plogp(logq).sum(-1), agreement], -1)


def sparse_row_terms(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    temperature: float,
    ignore_index: int,
    tail: bool,
) -> Tensor:
    """Return what `row_terms` does for a teacher of which K probabilities are known.

    With ``tail`` the rest of the mass is one token: ``r = 1 - sum_K q`` against
    ``P = 1 - sum_K p``. Without, the K are weights, KL is the cross-entropy ``-sum_K q log p``
    and the entropy 0. An index of -1 is no entry.
    """
    logp = torch.log_softmax(student / temperature, -1)
    known, token = indices >= 0, indices.clamp_min(0).long()
    logq = torch.where(known, log_probs.to(logp.dtype), float("-inf"))
    q, chosen = logq.exp(), logp.gather(1, token)
    first = q.argmax(-1, keepdim=True)
    best = student.gather(1, token.gather(1, first))[:, 0]
    agreement = (best == student.amax(-1)).to(student.dtype)
    lm = lm_terms(student, labels, ignore_index)
    if not tail:
        cross = -torch.where(q == 0, 0.0, q * chosen).sum(-1)
        return torch.stack([lm, cross, torch.zeros_like(lm), agreement], -1)
    kl = torch.where(q == 0, 0.0, q * (logq.nan_to_num(neginf=0.0) - chosen)).sum(-1)
    rest, log_share = bucket(logp, indices, q)
    kl = kl + torch.where(rest == 0, 0.0, rest * (rest.log().nan_to_num(neginf=0.0) - log_share))
    logr = torch.where(rest == 0, float("-inf"), rest.log())
    entropy = -plogp(torch.cat([logq, logr[:, None]], 1)).sum(-1)
    return torch.stack([lm, kl, entropy, agreement], -1)


def members(indices: Tensor, vocabulary: int) -> Tensor:
    """Return bool ``(N, V)``, the tokens among the indices."""
    inside = torch.zeros(len(indices), vocabulary + 1, dtype=torch.bool, device=indices.device)
    # entries that are none go to a column of their own
    column = torch.where(indices < 0, vocabulary, indices).long()
    return inside.scatter_(1, column, True)[:, :vocabulary]


def bucket(logp: Tensor, indices: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's mass outside the indices and the log of the student's.

    Where the indices are the whole vocabulary there is no outside, whatever the masses round to.
    """
    inside = members(indices, logp.shape[1])
    whole = inside.all(-1)
    # of nothing there is no logarithm, and no gradient
    outside = torch.where(inside & ~whole[:, None], float("-inf"), logp).logsumexp(-1)
    rest = torch.where(whole, 0.0, (1 - q.sum(-1)).clamp_min(0))
    return rest, outside


def combine(terms: Tensor, lm_weight: Tensor, kd_weight: Tensor, temperature: float) -> Tensor:
    """Return ``sum_i a_i LM_i + b_i tau^2 (KL_i + H_i)``."""
    lm, kl, entropy, _ = terms.unbind(-1)
    return (lm_weight * lm + kd_weight * temperature**2 * (kl + entropy)).sum()


def lm_gradient(student: Tensor, labels: Tensor, lm_weight: Tensor, ignore_index: int) -> Tensor:
    """Return ``a (p - e_y)``."""
    p = torch.softmax(student, -1)
    labelled = (labels != ignore_index).to(p.dtype)[:, None]
    place = torch.where(labels == ignore_index, 0, labels)[:, None]
    return p.scatter_add(1, place, -labelled) * lm_weight[:, None]


def logits_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """Return ``a (p - e_y) + b tau (p^tau - q^tau)``, the gradient of `combine`."""
    own = lm_gradient(student, labels, lm_weight, ignore_index)
    p, q = (torch.softmax(logits / temperature, -1) for logits in (student, teacher))
    return own + (kd_weight * temperature)[:, None] * (p - q)


def sparse_logits_gradient(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
    tail: bool,
) -> Tensor:
    """Return the gradient of `combine` of `sparse_row_terms`.

    ``p_v - q_v`` on the K tokens and ``p_v (1 - r / P)`` off them with ``tail``, and
    ``(sum_K q) p_v - q_v`` without.
    """
    own = lm_gradient(student, labels, lm_weight, ignore_index)
    logp = torch.log_softmax(student / temperature, -1)
    q = torch.where(indices >= 0, log_probs.to(logp.dtype).exp(), 0.0)
    token = indices.clamp_min(0).long()
    mass, off = q.sum(-1, keepdim=True), torch.zeros_like(logp)
    if tail:
        rest, log_share = bucket(logp, indices, q)
        mass = mass + rest[:, None]
        inside = members(indices, logp.shape[1])
        off = torch.where(inside, 0.0, (logp - log_share[:, None]).exp() * rest[:, None])
    slope = (mass * logp.exp() - off).scatter_add(1, token, -q)
    return own + (kd_weight * temperature)[:, None] * slope


def linear_distillation(
    hidden: list[Tensor],
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    rows: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
    chunk: int,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute statistics and gradients with all logits at once."""
    dtype = accumulate_dtype(weight.dtype)
    used = min(len(weight), len(teacher_weight))
    head, matrix = weight.to(dtype)[:used], teacher_weight.to(dtype)[:used]
    states = torch.cat(hidden).to(dtype)
    active = (rows >= 0).nonzero()[:, 0]
    student = states[active] @ head.T
    teacher = teacher_hidden.to(dtype)[rows[active]] @ matrix.T
    own = labels[active]
    stats = states.new_zeros(len(states), len(STATISTICS))
    stats[active] = row_terms(student, teacher, own, temperature, ignore_index)
    slope = logits_gradient(
        student, teacher, own, lm_weight[active], kd_weight[active], temperature, ignore_index
    )
    d_hidden = torch.zeros_like(states).index_copy_(0, active, slope @ head)
    sizes = [len(part) for part in hidden]
    # an op may not return views of one tensor
    d_parts = [part.clone() for part in d_hidden.split(sizes)] if grad_hidden else []
    d_weight = states.new_zeros(weight.shape if grad_weight else 0)
    if grad_weight:
        d_weight[:used] = slope.T @ states[active]
    return stats, d_parts, d_weight


def sparse_distillation(
    hidden: Tensor,
    weight: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    active: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
    tail: bool,
    chunk: int,
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute statistics and gradients with all logits at once."""
    dtype = accumulate_dtype(weight.dtype)
    states, head = hidden.to(dtype), weight.to(dtype)
    rows = active.nonzero()[:, 0]
    student = states[rows] @ head.T
    given = (indices[rows], log_probs[rows], labels[rows])
    stats = states.new_zeros(len(states), len(STATISTICS))
    stats[rows] = sparse_row_terms(student, *given, temperature, ignore_index, tail)
    slope = sparse_logits_gradient(
        student, *given, lm_weight[rows], kd_weight[rows], temperature, ignore_index, tail
    )
    d_hidden = states.new_zeros(hidden.shape if grad_hidden else 0)
    if grad_hidden:
        d_hidden[rows] = slope @ head
    d_weight = slope.T @ states[rows] if grad_weight else states.new_zeros(0)
    return stats, d_hidden, d_weight


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x times a number of its dtype, rounded once to another."""
    return torch.mul(x, scale, out=x.new_empty(x.shape, dtype=dtype))
