"""Entropy under a linear head in blocks that stay in a processor's caches, in plain torch."""

from typing import Final

import torch
from torch import Tensor

from shared_kernels.ops.lm_head.reference import accumulate_dtype, finish, merge_entropy

#: Rows and tokens of a block of logits: 4 MB in float32.
ROWS: Final = 256
TOKENS: Final = 4096


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.linear_entropy` defines, block by block of rows and of the head."""
    dtype = accumulate_dtype(hidden.dtype)
    count, vocabulary = hidden.shape[0], weight.shape[0]
    parts = -(-vocabulary // TOKENS)
    state = hidden.new_empty(3, parts, count, dtype=dtype)
    for part in range(parts):
        tokens = slice(part * TOKENS, (part + 1) * TOKENS)
        matrix = weight[tokens].to(dtype).T
        own = None if bias is None else bias[tokens]
        for low in range(0, count, ROWS):
            rows = slice(low, low + ROWS)
            logits = finish(hidden[rows].to(dtype) @ matrix, own, scale, softcap)
            peak = logits.amax(-1)
            logits -= torch.where(peak == float("-inf"), 0.0, peak)[:, None]
            p = logits.exp()
            state[0, part, rows] = peak
            state[1, part, rows] = p.sum(-1)
            # e^-inf counts nothing, and neither does what is far below every float
            state[2, part, rows] = p.mul_(logits.clamp_(min=-1e4)).sum(-1)
    return merge_entropy(*state)
