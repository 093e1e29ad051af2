"""Launches of the pooling kernels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from shared_kernels._library import interpreting
from shared_kernels.errors import KernelUnavailableError

#: Tokens a part of a segment has at least, and the most parts of one segment.
PART: Final = 256
MOST_PARTS: Final = 128
ROWS: Final = 32
COLS: Final = 128


def unsupported(hidden: Tensor, *args: Any) -> str | None:
    """Say why the kernels cannot take these arguments, or None."""
    return "float64 has no kernel" if hidden.dtype == torch.float64 else None


def update_unsupported(
    peak: Tensor, total: Tensor, weighted: Tensor, hidden: Tensor, *args: Any
) -> str | None:
    """Say why the kernel cannot take these arguments, or None."""
    return unsupported(weighted)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")


def segment_sums(
    hidden: Tensor, score: Tensor, cu_seqlens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `reference.segment_sums` defines: parts of segments, then their merge."""
    _refuse(unsupported(hidden))
    from shared_kernels.ops.pool import triton as kernels

    count, width = cu_seqlens.shape[0] - 1, hidden.shape[1]
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    # a segment may hold all the tokens: the lengths are not known here
    splits = max(1, min(MOST_PARTS, -(-hidden.shape[0] // PART)))
    splits = max(1, min(splits, 4096 // max(1, count)))
    state = hidden.new_empty(splits, 2, count, dtype=torch.float32)
    sums = hidden.new_empty(splits, count, width, dtype=torch.float32)
    if count:
        kernel: Any = kernels.segment_kernel
        with torch.cuda.device_of(hidden):
            kernel[(count, splits, max(1, -(-width // COLS)))](
                hidden,
                score,
                mask,
                cu_seqlens,
                state,
                sums,
                width,
                hidden.stride(0),
                count,
                ROWS=ROWS,
                COLS=COLS,
            )
    peak = state[:, 0].amax(0) if count else state.new_empty(0)
    shrink = torch.where(state[:, 0] == float("-inf"), 0.0, (state[:, 0] - peak).exp())
    return peak, (state[:, 1] * shrink).sum(0), (sums * shrink[..., None]).sum(0)


def plp_update_(
    peak: Tensor,
    total: Tensor,
    weighted: Tensor,
    hidden: Tensor,
    score: Tensor,
    numbers: Tensor,
    active: Tensor,
    features: Tensor,
) -> None:
    """Do what `reference.plp_update_` defines, in one launch and without asking the device."""
    _refuse(unsupported(weighted))
    from shared_kernels.ops.pool import triton as kernels

    if not len(peak):
        return
    kernel: Any = kernels.update_kernel
    with torch.cuda.device_of(hidden):
        kernel[(len(peak),)](
            peak,
            total,
            weighted,
            hidden,
            score,
            numbers,
            active,
            features,
            hidden.shape[1],
            numbers.shape[1],
            hidden.stride(0),
            features.stride(0),
            COLS=64 if interpreting() else 1024,
            NUMBERS=max(2, 1 << (max(1, numbers.shape[1]) - 1).bit_length()),
        )


def plp_output(
    inner: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Compute what `reference.plp_output` defines, in one launch."""
    _refuse(unsupported(inner))
    from shared_kernels.ops.pool import triton as kernels

    rows, width = inner.shape
    out = inner.new_empty(rows, len(bias), dtype=torch.float32)
    if not rows:
        return out
    kernel: Any = kernels.output_kernel
    with torch.cuda.device_of(inner):
        kernel[(rows,)](
            inner,
            gain,
            shift,
            weight,
            bias,
            out,
            width,
            len(bias),
            inner.stride(0),
            eps,
            COLS=64,
            BINS=max(2, 1 << (len(bias) - 1).bit_length()),
            num_warps=8,
        )
    return out
