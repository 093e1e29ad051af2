"""Two calls of PyTorch's FlashAttention over packed rows, and their merge, with a backward.

A softmax over two sets of keys is the two softmaxes merged by their log-sum-exps. Backward needs no
more than the merged ones: with ``P = exp(z - lse)`` and ``delta = rowsum(dO * O)`` of the whole,
each call's gradients are its part of the sum (as in ring attention, arXiv:2310.01889).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared_kernels.ops.prefix_attention import op

if TYPE_CHECKING:
    from shared_kernels.ops.prefix_attention.training.layout import PackedPrompts


def unsupported(q: Tensor, v: Tensor, layout: PackedPrompts, window: int | None) -> str | None:
    """Say why this cannot run, or None."""
    if not q.is_cuda:
        return f"it needs CUDA tensors, got {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs 16-bit tensors, got {q.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"it needs equal head sizes, multiples of 8 up to 256, got {q.shape[-1]}"
    if window is not None and window < layout.longest:
        return f"a window of {window} tokens hides some of the {layout.longest}"
    return None


class FlashPackedAttention(torch.autograd.Function):
    """See above."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedPrompts, scale: float
    ) -> Tensor:
        """Attend."""
        own, queries, keys = layout.segments(q.device)
        longest, most_queries, most_keys = layout.longest_parts()
        first = layout.prompt_tokens
        run = torch.ops.aten._flash_attention_forward
        out, lse, seed, offset, _ = run(
            q, k, v, own, own, longest, longest, 0.0, True, False, scale=scale
        )
        if layout.tokens > first:
            part, part_lse, *_ = run(
                q[first:], k[:first], v[:first], queries, keys, most_queries, most_keys, 0.0, False,
                False, scale=scale,
            )  # fmt: skip
            lses = [lse[:, first:].T.contiguous(), part_lse.T.contiguous()]
            merged, merged_lse = op.merge_states([out[first:], part], lses, None, "auto")
            out = torch.cat([out[:first], merged])
            lse = torch.cat([lse[:, :first], merged_lse.T], 1)
        ctx.save_for_backward(q, k, v, out, lse, seed, offset)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return gradients of queries, keys and values."""
        q, k, v, out, lse, seed, offset = ctx.saved_tensors
        layout = ctx.layout
        own, queries, keys = layout.segments(q.device)
        longest, most_queries, most_keys = layout.longest_parts()
        first = layout.prompt_tokens
        grad = grads[0].contiguous()
        run = torch.ops.aten._flash_attention_backward
        dq, dk, dv = run(
            grad, q, k, v, out, lse, own, own, longest, longest, 0.0, True, seed, offset,
            scale=ctx.scale,
        )  # fmt: skip
        if layout.tokens > first:
            part = run(
                grad[first:], q[first:], k[:first], v[:first], out[first:],
                lse[:, first:].contiguous(), queries, keys, most_queries, most_keys, 0.0, False,
                seed, offset, scale=ctx.scale,
            )  # fmt: skip
            dq[first:] += part[0]
            dk[:first] += part[1]
            dv[:first] += part[2]
        return dq, dk, dv, None, None
