"""Definition of attention over a shared prefix, and of the merge of attention states."""

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and of log-sum-exps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    lanes: Tensor,
    tiles: Tensor,
    blocks: Tensor,
    rows: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend row by row: gather what a row sees, one softmax over all of it.

    ``z_j = scale q.k_j``, with a cap ``c tanh(z_j / c)``, over the keys ``j`` at or before the
    query's position ``p`` and, with a window ``W``, ``p - j < W``;
    ``lse = log(sum_j e^z_j [+ e^sink])`` and ``out = sum_j e^(z_j - lse) v_j``.
    """
    dtype = accumulate_dtype(q.dtype)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=dtype)
    heads = k.shape[1]
    for q0, count, own, length, start, prefix, *ancestors in rows.tolist():
        if not count:
            continue
        ranges = list(zip(ancestors[::2], ancestors[1::2], strict=True))
        packed = [slice(low, low + n) for low, n in (*ranges, (own, length))]
        shared = slice(start, start + prefix)
        keys = torch.cat([shared_k[shared], *(k[part] for part in packed)]).to(dtype)
        values = torch.cat([shared_v[shared], *(v[part] for part in packed)]).to(dtype)
        queries = q[q0 : q0 + count].to(dtype).unflatten(1, (heads, -1))
        logits = torch.einsum("mhgd,nhd->mhgn", queries, keys) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        index = torch.arange(len(keys), device=q.device)
        ahead = index[len(keys) - count :, None] - index
        hidden = ahead < 0 if window is None else (ahead < 0) | (ahead >= window)
        logits = logits.masked_fill(hidden[:, None, None], float("-inf")).flatten(1, 2)
        total = logits.logsumexp(-1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(dtype))
        weights = (logits - total.nan_to_num(neginf=0.0)[..., None]).exp()
        weights = weights.unflatten(1, (heads, -1))
        result = torch.einsum("mhgn,nhd->mhgd", weights, values).flatten(1, 2)
        out[q0 : q0 + count] = result.to(out.dtype)
        lse[q0 : q0 + count] = total
    return out, lse


def merge_states(
    outs: list[Tensor], lses: list[Tensor], sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys.

    ``lse = log(sum_i e^lse_i [+ e^sink])``, ``out = sum_i e^(lse_i - lse) out_i``; a set without
    keys has ``lse_i = -inf`` and counts nothing, whatever its ``out_i`` holds.
    """
    dtype = accumulate_dtype(outs[0].dtype)
    parts = torch.stack([lse.to(dtype) for lse in lses])
    total = parts.logsumexp(0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(dtype))
    weights = (parts - total.nan_to_num(neginf=0.0)).exp()[..., None]
    stacked = torch.stack([out.to(dtype) for out in outs])
    # 0 times what an empty set's output holds must be 0, also where that is not a number
    merged = torch.where(weights == 0, 0.0, weights * stacked).sum(0)
    return merged.to(outs[0].dtype), total
