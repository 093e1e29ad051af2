"""The definition, by dense calls that autograd differentiates."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shared_kernels.ops.prefix_attention.training.layout import PackedPrompts


def packed_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedPrompts,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend from each prompt to itself, and from each continuation to its prompt and itself."""
    options = (scale, window, softcap, sinks)
    parts, firsts, place = [], [], 0
    for length in layout.prompts:
        firsts.append(place)
        here = slice(place, place + length)
        parts.append(_causal(q[here], k[here], v[here], *options))
        place += length
    for first, prompt, own in zip(firsts, layout.prompts, layout.continuations, strict=True):
        before = slice(first, first + prompt)
        for length in own:
            here = slice(place, place + length)
            keys, values = (torch.cat([x[before], x[here]]) for x in (k, v))
            parts.append(_causal(q[here], keys, values, *options))
            place += length
    return torch.cat(parts) if parts else q.new_zeros(0, q.shape[1], v.shape[2])


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend, the last query belonging to the last key; ``(T, H, D)``."""
    queries, keys = q.shape[0], k.shape[0]
    plain = softcap is None and sinks is None
    mask = None
    if not plain or keys != queries or (window is not None and window < keys):
        behind = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(
            keys, device=q.device
        )
        mask = behind >= 0
        if window is not None:
            mask &= behind < window
    if mask is None or plain:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(
            *heads_first, attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out[0].transpose(0, 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).to(wide) for x in (k, v))
    logits = torch.einsum("thd,khd->htk", q.to(wide), k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None].expand(-1, queries, 1)
        logits = torch.cat([logits, sink], -1)
    weights = logits.softmax(-1)[..., :keys]
    return torch.einsum("htk,khd->thd", weights, v).to(q.dtype)
