"""Launches of the attention kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.patching.attention.reference import count_rows

if TYPE_CHECKING:
    from torch import Tensor

#: Widest queries and values that the kernels take.
WIDEST: Final = 256


def unsupported(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    """Say why the kernels cannot take these arguments, or None."""
    if q.dtype == torch.float64:
        return "float64 has no kernel"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"wider than {WIDEST}"
    return None


def _power(size: int) -> int:
    return max(16, 1 << (max(1, size) - 1).bit_length())


def blocks(tokens: int, wide: int) -> tuple[int, int, int]:
    """Return queries of a block, keys of a block, and warps.

    The number of rows has no say, so that a row that is the base's differs from it by nothing.
    """
    if tokens <= 16:
        return 16, 16, 1 if wide <= 64 else 2
    if tokens <= 32 or wide > 128:
        return 32, 32, 4
    return 64, 32, 4


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
    """Compute what `reference.suffix_attention` defines."""
    if (reason := unsupported(q, k, v)) is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.patching.attention import triton as kernels

    rows, (_, _, examples, tokens, width) = count_rows(q, k, v), k.shape
    heads, _, queries, wide = base.shape
    out = q.new_empty(heads, rows, examples, queries, wide, dtype=dtype)
    if not out.numel():
        return out
    strides = [_strides(x) for x in (q, k, v)]
    programs = heads * examples * rows
    options: dict[str, Any] = {
        "CAUSAL": causal, "WINDOW": window is not None, "SOFTCAP": softcap is not None,
        "D": width, "DV": wide, "BDV": _power(wide),
    }  # fmt: skip
    numbers = (scale, 1.0 if softcap is None else softcap, 1 if window is None else window)
    # launch options are not part of the function's signature
    attend: Any = kernels.block_attention_kernel if at is None else kernels.query_attention_kernel
    with torch.cuda.device_of(q):
        if at is None:
            block_q, block_k, warps = blocks(tokens, wide)
            count = -(-tokens // block_q)
            attend[(programs * count,)](
                q, k, v, base, kv, out, rows, examples, tokens, count, *strides[0], *strides[1],
                *strides[2], *numbers, BD=min(64, _power(width)), BQ=block_q, BK=block_k,
                num_warps=warps, num_stages=2, enable_fp_fusion=False, **options,
            )  # fmt: skip
        else:
            attend[(programs,)](
                q, k, v, base, kv, at, out, rows, examples, tokens, *strides[0][:3], *strides[1],
                *strides[2], *numbers, BD=_power(width), BK=16, num_warps=1 if wide <= 128 else 2,
                enable_fp_fusion=False,
                **options,
            )  # fmt: skip
    return out


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Return the steps of heads, rows, examples and tokens; between rows that share it is 0."""
    head, row, example, token, _ = x.stride()
    return head, 0 if x.shape[1] == 1 else row, example, token
