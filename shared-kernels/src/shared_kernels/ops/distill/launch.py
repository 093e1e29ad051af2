"""Launches of the row kernels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from shared_kernels._library import interpreting
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.distill import chunks

#: Columns of a row that a program takes at a time, and its warps.
BLOCK: Final = 1024
SMALL_BLOCK: Final = 128
WARPS: Final = 8
#: Numbers that a program scales.
SCALED: Final = 4096
#: Tokens of a sparse teacher that a program can hold.
MOST_KNOWN: Final = 1024


def unsupported(hidden: list[Tensor], *args: Any) -> str | None:
    """Say why the kernel cannot take these arguments, or None."""
    return "float64 has no kernel" if hidden[0].dtype == torch.float64 else None


def distillation_rows(
    student: Tensor,
    slope: Tensor | None,
    teacher: Tensor,
    place: Tensor,
    labels: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
    stats: Tensor,
) -> None:
    """Write each row's statistics and, unless ``slope`` is None, its logits' gradient."""
    from shared_kernels.ops.distill import triton as kernels

    # launch options are not part of the function's signature
    kernel: Any = kernels.distillation_kernel
    with torch.cuda.device_of(student):
        kernel[(len(student),)](
            student,
            teacher,
            student if slope is None else slope,
            place,
            labels,
            lm_weight,
            kd_weight,
            stats,
            student.stride(0),
            teacher.stride(0),
            student.stride(0) if slope is None else slope.stride(0),
            student.shape[1],
            1 / temperature,
            temperature,
            ignore_index,
            TEMPERED=temperature != 1,
            GRADIENT=slope is not None,
            BLOCK=SMALL_BLOCK if interpreting() else BLOCK,
            num_warps=WARPS,
        )


def linear_distillation(hidden: list[Tensor], *args: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute what `reference.linear_distillation` defines, chunk by chunk."""
    if (reason := unsupported(hidden)) is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    return chunks.linear_distillation(distillation_rows, hidden, *args)


def sparse_unsupported(hidden: Tensor, weight: Tensor, indices: Tensor, *args: Any) -> str | None:
    """Say why the kernel cannot take these arguments, or None."""
    if indices.shape[1] > MOST_KNOWN:
        return f"a program holds at most {MOST_KNOWN} tokens of a row, got {indices.shape[1]}"
    return unsupported([hidden])


def sparse_rows(
    student: Tensor,
    slope: Tensor | None,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    lm_weight: Tensor,
    kd_weight: Tensor,
    temperature: float,
    ignore_index: int,
    tail: bool,
    stats: Tensor,
) -> None:
    """Write each row's statistics and, unless ``slope`` is None, its logits' gradient."""
    from shared_kernels.ops.distill import triton as kernels

    # launch options are not part of the function's signature
    kernel: Any = kernels.sparse_kernel
    known = indices.shape[1]
    with torch.cuda.device_of(student):
        kernel[(len(student),)](
            student,
            student if slope is None else slope,
            indices.contiguous(),
            log_probs.contiguous(),
            labels,
            lm_weight,
            kd_weight,
            stats,
            student.stride(0),
            student.stride(0) if slope is None else slope.stride(0),
            student.shape[1],
            known,
            1 / temperature,
            temperature,
            ignore_index,
            TAIL=tail,
            TEMPERED=temperature != 1,
            GRADIENT=slope is not None,
            BLOCK=SMALL_BLOCK if interpreting() else BLOCK,
            KNOWN=max(16, 1 << (known - 1).bit_length()),
            num_warps=WARPS,
        )


def sparse_distillation(
    hidden: Tensor, weight: Tensor, indices: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `reference.sparse_distillation` defines, chunk by chunk."""
    if (reason := sparse_unsupported(hidden, weight, indices)) is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    return chunks.sparse_distillation(sparse_rows, hidden, weight, indices, *args)


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x times a number of its dtype, rounded once to another."""
    from shared_kernels.ops.distill import triton as kernels

    x, out = x.contiguous(), x.new_empty(x.shape, dtype=dtype)
    # launch options are not part of the function's signature
    kernel: Any = kernels.scale_kernel
    if x.numel():
        with torch.cuda.device_of(x):
            kernel[(-(-x.numel() // SCALED),)](x, scale, out, x.numel(), BLOCK=SCALED, num_warps=8)
    return out
