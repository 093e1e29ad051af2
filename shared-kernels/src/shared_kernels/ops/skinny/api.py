"""The public function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared_kernels._checks import check_tensor, message
from shared_kernels.ops.skinny import op
from shared_kernels.ops.skinny.launch import MOST_ROWS

__all__ = ["MOST_ROWS", "skinny_linears"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def skinny_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Multiply few rows by several matrices: ``x W^T + b`` of each, in one launch.

    What decoding spends its time with: a matrix is read once, and products of one small matrix do
    not fill a GPU. Sums are float32, rounded once; each row of a result has the same bits whatever
    the other rows are. Reads each matrix once; ``2 M N K`` FLOPs each.

    Args:
        x: float ``(M, K)``; the kernel takes up to `MOST_ROWS` rows.
        weights: One to four ``(N_i, K)``, of x's dtype, rows contiguous.
        biases: As many ``(N_i,)``, or None.
        impl: ``auto``, ``triton`` or ``reference`` (the matrix library, one by one).

    Returns:
        ``(M, N_i)`` each: views of one tensor, so that rows are not adjacent.

    Raises:
        TypeError: A dtype that is not listed, or not x's.
        ValueError: No matrix, shapes or devices that do not fit together, or a tensor that is part
            of an autograd graph (there is no backward).
        KernelUnavailableError: ``impl`` names an implementation that cannot run here.
    """
    check_tensor("x", x, dtypes=_DTYPES, shape=(None, None), strided=True)
    if not weights or (biases is not None and len(biases) != len(weights)):
        remedy = "give at least one matrix, and a bias for each or None"
        raise ValueError(message("weights", "as many matrices as biases", len(weights), remedy))
    check: Any = {"dtypes": (x.dtype,), "device": x.device}
    for weight in weights:
        check_tensor("weights", weight, shape=(None, x.shape[1]), **check)
    for weight, bias in zip(weights, biases or (), strict=False):
        check_tensor("biases", bias, shape=(weight.shape[0],), **check)
    rows = x if x.stride(-1) == 1 else x.contiguous()
    joined = op.skinny_linears(rows, [*weights], [*(biases or ())], impl)
    return joined.split([weight.shape[0] for weight in weights], -1)
