"""Definition of decoding attention over a prefix and the slots' own keys."""

import torch
from torch import Tensor

from shared_kernels.ops.prefix_attention.reference import accumulate_dtype


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    lengths: Tensor,
    starts: Tensor,
    prefix_lengths: Tensor,
    order: Tensor,
    tiles: Tensor,
    capacity: int,
    tile: int,
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend slot by slot: one softmax over a copy of the prefix and of the own keys.

    ``z_j = scale q.k_j``, with a cap ``c tanh(z_j / c)``, over the keys less than ``window`` behind
    the last; ``lse = log(sum_j e^z_j [+ e^sink])`` and ``out = sum_j e^(z_j - lse) v_j``.
    """
    dtype = accumulate_dtype(q.dtype)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=dtype)
    found = zip(lengths.tolist(), starts.tolist(), prefix_lengths.tolist(), strict=True)
    for slot, (length, start, prefix) in enumerate(found):
        if not length:
            continue
        skipped = 0 if window is None else max(0, prefix + length - window)
        shared = slice(start + min(skipped, prefix), start + prefix)
        own = slice(slot * capacity + max(0, skipped - prefix), slot * capacity + length)
        keys = torch.cat([shared_k[shared], k[own]]).to(dtype)
        values = torch.cat([shared_v[shared], v[own]]).to(dtype)
        queries = q[slot].to(dtype).unflatten(0, (k.shape[1], -1))
        logits = torch.einsum("hgd,nhd->hgn", queries, keys) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.flatten(0, 1)
        total = logits.logsumexp(-1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(dtype))
        weights = (logits - total[:, None]).exp().unflatten(0, (k.shape[1], -1))
        out[slot] = torch.einsum("hgn,nhd->hgd", weights, values).flatten(0, 1).to(out.dtype)
        lse[slot] = total
    return out, lse
