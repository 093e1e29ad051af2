"""Definition of the attention of many rows, less that of the base run."""

import torch
from torch import Tensor


def count_rows(*tensors: Tensor) -> int:
    """Return how many rows ``(heads, rows, ...)`` share one batch: what is 1 belongs to all."""
    return next((t.shape[1] for t in tensors if t.shape[1] != 1), 1)


def _row(x: Tensor, row: int) -> Tensor:
    """Return one row in one piece, so that the matrix library takes it as it takes any other."""
    return x[:, 0 if x.shape[1] == 1 else row].contiguous()


def suffix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    kv: Tensor,
    at: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``softmax(c tanh(s q k^T / c)) v - base`` row by row, of the keys that are seen."""
    rows, tokens = count_rows(q, k, v), k.shape[3]
    index = torch.arange(tokens, device=q.device)
    # (examples or 1, queries): how far behind a query each key is
    place = index[None] if at is None else at[:, None]
    behind = place[..., None] - index
    hidden = behind < 0 if causal else torch.zeros_like(behind, dtype=torch.bool)
    if window is not None:
        hidden |= behind >= window
    k, v = k[kv], v[kv]
    found = []
    for row in range(rows):
        queries, keys, values = (_row(x, row) for x in (q, k, v))
        scores = queries @ keys.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        law = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        found.append(law @ values - base)
    if not found:
        return q.new_empty(len(kv), 0, *base.shape[1:], dtype=dtype)
    return torch.stack(found, 1).to(dtype)
