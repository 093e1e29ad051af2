"""The public function."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_kernels._checks import check_range, check_tensor, message
from shared_kernels.ops.patching.attention import op, reference

_FLOATS = (torch.float32, torch.float64)


def suffix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor,
    kv: Tensor,
    *,
    at: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Attend in M rows and H heads, and subtract what the base run gave.

    Each of Mq, Mk and Mv is M, or 1 for what all rows share; shared tensors are not copied, and
    neither are those with other strides whose last dimension is contiguous. Scores, softmax and
    sums are float32; products are of 22 bits at least, not of TF32's 11. Results repeat bit for
    bit, and those of a row do not depend on the number of rows: a row equal to the base whose
    result is subtracted gives exactly 0. All that is seen must be finite. Reads q, k and v once for
    each block of 64 queries, ``2 M N H T Tq (d + dv)`` FLOPs or half of them.

    Args:
        q: float32 or float64 ``(H, Mq, N, Tq, d)``.
        k: ``(K, Mk, N, T, d)`` of q's dtype.
        v: ``(K, Mv, N, T, dv)`` of q's dtype; d and dv are 256 at most for the kernel.
        base: ``(H, N, Tq, dv)`` of q's dtype, the heads' results in the base run.
        kv: int64 ``(H,)``, which of the K key heads each head uses. Checked on a CPU only.
        at: int64 ``(N,)``, positions in ``[0, T)`` of the only queries, Tq = 1, checked on a CPU
            only; without it Tq = T and query i is at position i.
        scale: Of the inner products.
        window: A query at position i sees the keys j with ``i - window < j <= i``.
        softcap: c of ``c tanh(s / c)``.
        causal: Whether a query at position i sees the keys up to i; else it sees all of its
            example, and there is no window.
        dtype: Of the result: float32 or bfloat16, or float64 for float64.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        ``(H, M, N, Tq, dv)`` of ``dtype``.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes or devices that do not fit together, an index or number out of range, or
            a tensor of an autograd graph.
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("q", q, dtypes=_FLOATS, shape=(None,) * 5, strided=True)
    heads, _, examples, queries, width = q.shape
    device, dtypes = q.device, (q.dtype,)
    shape: tuple[int | None, ...] = (None, None, examples, None, width)
    check_tensor("k", k, dtypes=dtypes, shape=shape, device=device, strided=True)
    tokens = k.shape[3]
    shape = (k.shape[0], None, examples, tokens, None)
    check_tensor("v", v, dtypes=dtypes, shape=shape, device=device, strided=True)
    shape = (heads, examples, queries, v.shape[-1])
    check_tensor("base", base, dtypes=dtypes, shape=shape, device=device)
    check_tensor("kv", kv, dtypes=(torch.int64,), shape=(heads,), device=device)
    if at is not None:
        check_tensor("at", at, dtypes=(torch.int64,), shape=(examples,), device=device)
    wanted = tokens if at is None else 1
    if queries != wanted:
        remedy = "give at with one query for each example, or as many queries as keys without it"
        raise ValueError(message("q", f"{wanted} queries", q, remedy))
    rows = reference.count_rows(q, k, v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[1] not in (1, rows):
            raise ValueError(message(name, f"1 or {rows} rows", tensor, "give one row or all"))
    _check_index("kv", kv, k.shape[0], "name a head of k")
    if at is not None:
        _check_index("at", at, tokens, "name a token")
    if window is not None:
        check_range("window", window, 1, 1 << 31, "a query sees itself at least, or use None")
        if not causal:
            remedy = "it would end at the query"
            raise ValueError(message("window", "None without causal", window, remedy))
    if softcap is not None and not softcap > 0:
        raise ValueError(message("softcap", "a positive number", softcap, "use None for none"))
    allowed = (torch.float32, torch.bfloat16) if q.dtype == torch.float32 else (torch.float64,)
    if dtype not in allowed:
        names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
        raise TypeError(message("dtype", names, dtype, "round the result afterwards"))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cap = None if softcap is None else float(softcap)
    return op.suffix_attention(
        q, k, v, base, kv, at, float(scale), window, cap, causal, dtype, impl
    )


def _check_index(name: str, index: Tensor, end: int, remedy: str) -> None:
    """Refuse what would be read beside the tensors, where looking costs no wait for a device."""
    if index.device.type == "cpu" and bool(((index < 0) | (index >= end)).any()):
        raise ValueError(message(name, f"numbers in [0, {end})", index.tolist(), remedy))
