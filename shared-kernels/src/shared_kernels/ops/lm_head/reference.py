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
            entropies[part] = total - ((logits - total[:, None]).exp() * logits).sum(-1)
    return results
