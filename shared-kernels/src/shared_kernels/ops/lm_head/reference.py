"""Definition of log-probabilities under a linear head."""

import torch
from torch import Tensor

#: Logits held at a time.
BLOCK_ELEMENTS = 1 << 24


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finish(logits: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Turn products into logits: ``z = c tanh(s (h.w + b) / c)``."""
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def empty_results(hidden: Tensor, targets: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Return unwritten results, in the order of `LinearLogprob`."""
    dtype, count = accumulate_dtype(hidden.dtype), hidden.shape[0]
    make = hidden.new_empty
    return (
        make(targets.shape[0], dtype=dtype),
        make(count, dtype=dtype),
        make(count, dtype=torch.int64),
        make(count, dtype=dtype),
        make(count, top_k, dtype=dtype),
        make(count, top_k, dtype=torch.int64),
    )


def entropy_of(logprobs: Tensor) -> Tensor:
    """Return ``-sum_v p_v log p_v`` of each row; what is impossible counts nothing."""
    p = logprobs.exp()
    return -torch.where(p == 0, 0.0, p * logprobs).sum(-1)


def merge_entropy(peak: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return entropy and log-sum-exp of sums over parts ``(P, N)`` of the vocabulary.

    A part has ``s = sum e^(z - m)`` and ``u = sum (z - m) e^(z - m)``; with ``d = m_part - m``,
    ``s = sum s_part e^d``, ``u = sum e^d (u_part + d s_part)`` and ``H = log s - u / s``.
    """
    highest = peak.amax(0)
    # a part without a possible token adds nothing
    shift = torch.where(peak == float("-inf"), 0.0, peak - highest)
    shrink = torch.where(peak == float("-inf"), 0.0, shift.exp())
    whole = (total * shrink).sum(0)
    centred = (shrink * (moment + shift * total)).sum(0)
    return whole.log() - centred / whole, highest + whole.log()


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute the logits of some rows at a time: ``H = -sum_v p_v log p_v``, ``lse``."""
    dtype = accumulate_dtype(hidden.dtype)
    matrix = weight.to(dtype).T
    entropies = hidden.new_empty(hidden.shape[0], dtype=dtype)
    lse = torch.empty_like(entropies)
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[0]))
    for low in range(0, hidden.shape[0], step):
        part = slice(low, low + step)
        logits = finish(hidden[part].to(dtype) @ matrix, bias, scale, softcap)
        lse[part] = total = logits.logsumexp(-1)
        entropies[part] = entropy_of(logits - total[:, None])
    return entropies, lse


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    entropy: bool,
    top_k: int,
) -> tuple[Tensor, ...]:
    """Compute the logits of some rows at a time.

    ``lse = log(sum_v e^z_v)``, log-probability ``z_y - lse``, entropy ``lse - sum_v p_v z_v``.
    """
    results = empty_results(hidden, targets, top_k)
    logprob, lse, argmax, entropies, top_values, top_indices = results
    dtype = lse.dtype
    matrix = weight.to(dtype).T
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[0]))
    for low in range(0, hidden.shape[0], step):
        part = slice(low, low + step)
        logits = finish(hidden[part].to(dtype) @ matrix, bias, scale, softcap)
        lse[part] = total = logits.logsumexp(-1)
        argmax[part] = logits.argmax(-1)
        inside = ((rows >= low) & (rows < low + step)).nonzero()[:, 0]
        own = rows[inside] - low
        logprob[inside] = logits[own, targets[inside]] - total[own]
        if top_k:
            values, top_indices[part] = logits.topk(top_k)
            top_values[part] = values - total[:, None]
        if entropy:
            entropies[part] = entropy_of(logits - total[:, None])
    return results
