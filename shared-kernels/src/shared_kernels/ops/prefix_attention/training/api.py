"""The public function."""

from typing import Any

import torch
from torch import Tensor

from shared_kernels._checks import check_choice, message
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.prefix_attention.training import flash, reference
from shared_kernels.ops.prefix_attention.training.layout import PackedPrompts

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def packed_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedPrompts,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend from prompts to themselves, and from continuations to their prompt and themselves.

    All causally: as if each continuation stood behind a prompt of its own, whose tokens are
    computed once. The gradients of a prompt's keys and values are sums over its continuations.
    Query head ``h`` reads key head ``h // (Hq / Hkv)``. ``flash`` makes two calls of PyTorch's
    FlashAttention and merges them, and holds no logits; it is deterministic in forward, and in
    backward as FlashAttention is. ``reference`` makes one dense call for each text.

    Args:
        q: float ``(T, Hq, D)``, tokens as the layout says.
        k: ``(T, Hkv, D)``, after their position embedding.
        v: ``(T, Hkv, Dv)``.
        layout: What lies where.
        scale: Of the inner products; ``D ** -0.5`` by default.
        window: Keys ``window`` or more positions behind a query are hidden (sliding window).
        softcap: Logits become ``softcap tanh(logit / softcap)``.
        sinks: float ``(Hq,)``, a logit per head that joins the softmax with value 0.
        impl: ``auto`` (``flash`` for 16 bits on CUDA if it has the options), ``flash`` or
            ``reference``.

    Returns:
        ``(T, Hq, Dv)`` in q's dtype, part of the autograd graph.

    Raises:
        TypeError: A dtype that is not listed, or not q's.
        ValueError: Shapes that do not fit together or the layout, or options that are not positive.
        KernelUnavailableError: ``flash`` cannot run here.
    """
    check_choice("impl", impl, ("auto", "flash", "reference"))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise TypeError(message(name, f"a float tensor of dtype {q.dtype}", x, "convert it"))
        if x.dim() != 3 or x.shape[0] != layout.tokens or x.device != q.device:
            wanted = f"shape ({layout.tokens}, heads, dim) on {q.device}"
            raise ValueError(message(name, wanted, x, "pack it as the layout says"))
    if k.shape[1:] != (v.shape[1], q.shape[2]) or not k.shape[1] or q.shape[1] % k.shape[1]:
        remedy = "query heads must be a multiple of key heads, and keys as wide as queries"
        raise ValueError(message("k", "keys that fit q and v", k, remedy))
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(message("sinks", f"shape ({q.shape[1]},)", sinks, "one logit per head"))
    for name, option in (("scale", scale), ("window", window), ("softcap", softcap)):
        if option is not None and not option > 0:
            raise ValueError(message(name, "a positive number or None", option, "leave it out"))
    factor = q.shape[2] ** -0.5 if scale is None else float(scale)
    reason = flash.unsupported(q, v, layout, window)
    if softcap is not None or sinks is not None:
        reason = reason or "it has no cap and no sinks"
    if impl == "flash" and reason is not None:
        raise KernelUnavailableError(
            f"packed_prefix_attention: impl='flash' cannot run: {reason}; use impl='auto'"
        )
    if impl == "reference" or reason is not None or not layout.tokens:
        return reference.packed_prefix_attention(q, k, v, layout, factor, window, softcap, sinks)
    found: Any = flash.FlashPackedAttention.apply(
        q.contiguous(), k.contiguous(), v.contiguous(), layout, factor
    )
    return found
