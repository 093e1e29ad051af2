"""Launches of the kernels.

Multiplications and additions are not fused: what is rounded to fp8 is then what float32 would be.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.patching.reference import FP8

#: A program holds a token's whole width where it takes norms.
MOST_WIDTH: Final = 32768
#: Columns of a program that needs nothing of the others.
COLUMNS: Final = 1024
#: Activations that one program holds, and how many it takes at a time where there are more.
MOST_FEATURES: Final = 8192
FEATURES: Final = 4096


def norm_unsupported(x: Tensor, deltas: Tensor, *args: Any) -> str | None:
    """Say why the kernels of norms cannot take these arguments, or None."""
    if torch.float64 in (x.dtype, deltas.dtype, args[-1]):
        return "float64 has no kernel"
    if x.shape[-1] > MOST_WIDTH:
        return f"a width above {MOST_WIDTH}"
    return None


def activation_unsupported(moved: Tensor, base: Tensor, *args: Any) -> str | None:
    """Say why the kernel of activations cannot take these arguments, or None."""
    has = torch.float64 in (moved.dtype, base.dtype, args[-1])
    return "float64 has no kernel" if has else None


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")


def _block(width: int, most: int) -> tuple[int, int]:
    """Return columns of a block, and warps: 8 columns for each thread up to 4096."""
    block = min(1 << (width - 1).bit_length(), most)
    return block, min(max(block // 256, 1), 16 if block <= 8192 else 32)


def outputs(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return values and scales that are not filled in yet."""
    scales = shape[:-1] if dtype == FP8 else (0,)
    return like.new_empty(shape, dtype=dtype), like.new_empty(scales, dtype=torch.float32)


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8) if values.dtype == FP8 else values


def combine_norm(
    x: Tensor,
    wide: Tensor,
    narrow: Tensor,
    offsets: Tensor,
    entries: Tensor,
    at: Tensor | None,
    weight: Tensor | None,
    kind: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.combine_norm` defines, in one launch."""
    _refuse(norm_unsupported(x, wide, dtype))
    from shared_kernels.ops.patching import triton as kernels

    groups, tokens, width = x.shape
    rows = wide.shape[1]
    values, scale = outputs(x, (groups, rows, tokens, width), dtype)
    if not values.numel():
        return values, scale
    block, warps = _block(width, MOST_WIDTH)
    kernel: Any = kernels.combine_norm_kernel
    with torch.cuda.device_of(x):
        kernel[(groups * rows * tokens,)](
            x, wide, narrow, offsets, entries, at, weight, _bytes(values), scale,
            groups, rows, tokens, width, *wide.stride()[:2], *narrow.stride()[:2], float(eps),
            KIND=kind, FP8=dtype == FP8, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return values, scale


def prefix_norm(
    x: Tensor,
    differences: Tensor,
    picked: Tensor,
    drop: Tensor,
    start: Tensor | None,
    at: Tensor | None,
    weight: Tensor | None,
    kind: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.prefix_norm` defines, in one launch."""
    _refuse(norm_unsupported(x, differences, dtype))
    from shared_kernels.ops.patching import triton as kernels

    (tokens, width), rows = x.shape, len(picked)
    values, scale = outputs(x, (rows, tokens, width), dtype)
    if not values.numel():
        return values, scale
    whole = kind != "none" or dtype == FP8
    block, warps = _block(width, MOST_WIDTH if whole else COLUMNS // 4)
    kernel: Any = kernels.prefix_norm_kernel
    with torch.cuda.device_of(x):
        kernel[(tokens, -(-width // block))](
            x, differences, picked, drop, start, at, weight, _bytes(values), scale,
            rows, tokens, width, differences.stride(0), float(eps),
            KIND=kind, FP8=dtype == FP8, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return values, scale


def activation_delta(
    moved: Tensor, base: Tensor, act: str, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.activation_delta` defines, in one launch."""
    _refuse(activation_unsupported(moved, base, dtype))
    from shared_kernels.ops.patching import triton as kernels

    rows, tokens, inputs = moved.shape
    features = inputs // 2 if gated else inputs
    values, scale = outputs(moved, (rows, tokens, features), dtype)
    if not values.numel():
        return values, scale
    args = (moved, base, _bytes(values), scale, rows, tokens, features)
    options = {"ACT": act, "GATED": gated, "enable_fp_fusion": False}
    with torch.cuda.device_of(moved):
        if dtype == FP8 and features > MOST_FEATURES:
            scaled: Any = kernels.activation_scaled_kernel
            scaled[(rows * tokens,)](*args, **options, BLOCK=FEATURES, num_warps=16)
        else:
            block, warps = _block(features, MOST_FEATURES if dtype == FP8 else COLUMNS)
            kernel: Any = kernels.activation_kernel
            kernel[(rows * tokens, -(-features // block))](
                *args, **options, FP8=dtype == FP8, BLOCK=block, num_warps=warps
            )
    return values, scale
