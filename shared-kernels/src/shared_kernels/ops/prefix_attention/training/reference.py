"""The definition, by dense calls that autograd differentiates."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shared_kernels.ops.prefix_attention.training.layout import PackedPrompts


def packed_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedPrompts, scale: float, window: int | None
) -> Tensor:
    """Attend from each prompt to itself, and from each continuation to its prompt and itself."""
    parts, firsts, place = [], [], 0
    for length in layout.prompts:
        firsts.append(place)
        here = slice(place, place + length)
        parts.append(_causal(q[here], k[here], v[here], scale, window))
        place += length
    for first, prompt, own in zip(firsts, layout.prompts, layout.continuations, strict=True):
        before = slice(first, first + prompt)
        for length in own:
            here = slice(place, place + length)
            keys, values = (torch.cat([x[before], x[here]]) for x in (k, v))
            parts.append(_causal(q[here], keys, values, scale, window))
            place += length
    return torch.cat(parts) if parts else q.new_zeros(0, q.shape[1], v.shape[2])


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend, the last query belonging to the last key; ``(T, H, D)``."""
    queries, keys = q.shape[0], k.shape[0]
    mask = None
    if keys != queries or (window is not None and window < keys):
        behind = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(
            keys, device=q.device
        )
        mask = behind >= 0
        if window is not None:
            mask &= behind < window
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(
        *heads_first, attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)
