"""Public functions: attention of one newest token per slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared_kernels._checks import check_tensor, message
from shared_kernels.ops.prefix_attention.decode import launch, op

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def decode_tile(heads: int, key_heads: int) -> int:
    """Return the most slots of a tile of `decode_attention`, for so many heads."""
    return launch.tile_of(heads, key_heads)


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
    *,
    capacity: int | None = None,
    longest: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from the newest token of each slot to its prefix and to its own keys.

    One softmax over both, as if each slot had a copy of its prefix. A prefix is read once for each
    tile of slots that share it, own keys once. Lengths are read on the device, so the call can be
    part of a CUDA graph; a slot's result has the same bits whatever the other slots hold. Sums are
    float32 (float64 for float64); 4 FLOPs per query head, visible key and dimension.

    Args:
        q: float ``(S, Hq, D)``.
        k: ``(K, Hkv, D)``, the slots' own keys after their position embedding: those of slot ``s``
            begin at ``s * capacity``.
        v: ``(K, Hkv, Dv)``.
        shared_k: ``(M, Hkv, D)``, keys of the prefixes.
        shared_v: ``(M, Hkv, Dv)``.
        lengths: int64 ``(S,)``, own keys of each slot with that of the newest token; 0 for an idle
            slot, which gets 0 and -inf.
        starts: int64 ``(S,)``, where each slot's prefix begins.
        prefix_lengths: int64 ``(S,)``, keys of each slot's prefix.
        order: int64 ``(S,)``, slots in an order in which those of one prefix are neighbours.
        tiles: int64 ``(2, S + 1)``, first place in ``order`` and number of slots of each tile, at
            most `decode_tile`; all slots of a tile have one prefix, each busy slot is in one, and
            empty ones come last.
        capacity: Keys that a slot has room for; ``K // S`` by default. Idle slots need no room.
        longest: Bound on ``prefix_lengths``; ``M`` by default.
        scale: Of the inner products, positive; ``D ** -0.5`` by default.
        window: Keys ``window`` or more positions behind a query are hidden (sliding window).
        softcap: Logits become ``softcap tanh(logit / softcap)``.
        sinks: float ``(Hq,)``, a logit per head that joins the softmax with value 0.
        impl: ``auto``, ``triton``, ``numba`` or ``reference``.

    Returns:
        Output ``(S, Hq, Dv)`` in q's dtype, and the natural log-sum-exp ``(S, Hq)``, float32, sinks
        included.

    Raises:
        TypeError: A tensor has a dtype that is not listed, or not q's.
        ValueError: Shapes or devices do not fit together, or an option is not positive.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("q", q, dtypes=_DTYPES, shape=(None, None, None), strided=True)
    slots, heads, dim = q.shape
    check: Any = {"dtypes": (q.dtype,), "device": q.device, "strided": True}
    check_tensor("k", k, shape=(None, None, dim), **check)
    check_tensor("v", v, shape=(k.shape[0], k.shape[1], None), **check)
    check_tensor("shared_k", shared_k, shape=(None, k.shape[1], dim), **check)
    check_tensor("shared_v", shared_v, shape=(shared_k.shape[0], *v.shape[1:]), **check)
    if not k.shape[1] or heads % k.shape[1]:
        remedy = "query heads must be a multiple of key heads"
        raise ValueError(message("q", f"a multiple of {k.shape[1]} heads", q, remedy))
    integers: Any = {"dtypes": (torch.int64,), "device": q.device}
    for name, table in (
        ("lengths", lengths), ("starts", starts), ("prefix_lengths", prefix_lengths),
        ("order", order),
    ):  # fmt: skip
        check_tensor(name, table, shape=(slots,), **integers)
    check_tensor("tiles", tiles, shape=(2, slots + 1), **integers)
    if sinks is not None:
        check_tensor("sinks", sinks, dtypes=_DTYPES, shape=(heads,), device=q.device)
    for name, option in (("scale", scale), ("window", window), ("softcap", softcap)):
        if option is not None and not option > 0:
            raise ValueError(message(name, "a positive number or None", option, "leave it out"))
    return op.decode_attention(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, shared_k, shared_v)),
        lengths, starts, prefix_lengths, order, tiles,
        k.shape[0] // max(1, slots) if capacity is None else capacity,
        launch.tile_of(heads, k.shape[1]), shared_k.shape[0] if longest is None else longest,
        dim**-0.5 if scale is None else float(scale), window, softcap, sinks, impl,
    )  # fmt: skip
