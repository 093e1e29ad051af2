"""The launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from shared_kernels.errors import KernelUnavailableError

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS: Final = 64
MOST_MATRICES: Final = 4
#: Good for 32 and for 64 rows at the shapes of a 1.7B model on an H100.
BLOCK_N: Final = 64
BLOCK_K: Final = 128


def unsupported(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> str | None:
    """Say why the kernel cannot take these arguments, or None."""
    if x.dtype == torch.float64:
        return "float64 has no kernel"
    if x.shape[0] > MOST_ROWS:
        return f"more than {MOST_ROWS} rows"
    if len(weights) > MOST_MATRICES:
        return f"more than {MOST_MATRICES} matrices"
    return None


def skinny_linears(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Compute what `reference.skinny_linears` defines."""
    reason = unsupported(x, weights, biases)
    if reason is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.skinny import triton as kernels

    sizes = [weight.shape[0] for weight in weights]
    rows, inner = x.shape
    y = x.new_empty(rows, sum(sizes))
    if not y.numel():
        return y
    more = MOST_MATRICES - len(weights)
    held = [*biases] or [weights[0]]
    wide = x.dtype == torch.float32
    kernel: Any = kernels.linears_kernel
    with torch.cuda.device_of(x):
        kernel[(sum(-(-n // BLOCK_N) for n in sizes),)](
            x, y, *weights, *weights[:1] * more, *held, *held[:1] * (MOST_MATRICES - len(held)),
            *sizes, *[0] * more, rows, inner, x.stride(0), y.stride(0),
            COUNT=len(weights), BIAS=bool(biases),
            BLOCK_M=max(16, 1 << (rows - 1).bit_length()), BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K // (2 if wide else 1), PRECISION="ieee" if wide else "tf32",
            num_warps=4, num_stages=4,
        )  # fmt: skip
    return y
