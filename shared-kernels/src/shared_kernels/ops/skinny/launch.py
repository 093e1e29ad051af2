"""The launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from shared_kernels.errors import KernelUnavailableError

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS: Final = 64
MOST_MATRICES: Final = 4
#: Programs that fill a large GPU: with as many, more of them wait than run at once.
_MANY: Final = 128


def blocks(rows: int, sizes: list[int], wide: bool) -> tuple[int, int, int, int]:
    """Return outputs and inner entries of a block, warps, and stages.

    The fastest of 300 on an H200, at the shapes of a 1.7B model for 32 and for 64 rows. Shapes
    alone decide, so that results have the same bits in every run.
    """
    if wide:
        return 64, 64, 4, 4
    if sum(-(-n // 64) for n in sizes) < _MANY:
        # one block for each multiprocessor at most: deep pipelines hide what it waits for
        return 64, 128, 4, 6 if rows <= 32 else 4
    return (64, 128, 4, 3) if rows <= 32 else (128, 64, 8, 6)


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
    block_n, block_k, warps, stages = blocks(rows, sizes, x.dtype == torch.float32)
    kernel: Any = kernels.linears_kernel
    with torch.cuda.device_of(x):
        kernel[(sum(-(-n // block_n) for n in sizes),)](
            x, y, *weights, *weights[:1] * more, *held, *held[:1] * (MOST_MATRICES - len(held)),
            *sizes, *[0] * more, rows, inner, x.stride(0), y.stride(0),
            COUNT=len(weights), BIAS=bool(biases),
            BLOCK_M=max(16, 1 << (rows - 1).bit_length()), BLOCK_N=block_n, BLOCK_K=block_k,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
    return y
