"""Launches of the kernels over tensor descriptors: 16-bit rows on Hopper and later."""

import functools
from typing import Any

import torch
from torch import Tensor

from shared_kernels._library import interpreting
from shared_kernels.ops.dp import reference

#: Launch configurations. Two accumulators of 128 x 256 would not fit the registers.
GRAM = {"BT": 128, "BK": 64, "num_warps": 8, "num_stages": 4}
PRODUCT = {"BP": 128, "BD": 256, "GROUP": 8, "num_warps": 8, "num_stages": 3}
#: Depths of a step, which divide the length of every unit.
DEPTHS = (64, 32, 16)
#: Units that one program can rank, and programs that fill a large GPU once.
RANKED, ONE_WAVE = 1024, 132
#: Units that a rank is compared with at a time.
RANK_STEP = 32
#: Programs that fill a large GPU twice. A constant, so that sums do not depend on the GPU.
PROGRAMS = 264


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability."""
    return torch.cuda.get_device_capability(device)


def ceil_div(numerator: int, denominator: int) -> int:
    """Divide and round up."""
    return -(-numerator // denominator)


def power_of_two(count: int) -> int:
    """Return the power of two that is not below a positive number."""
    return 1 << max(count - 1, 0).bit_length()


def fits(*matrices: Tensor) -> bool:
    """Whether tensor descriptors can describe these matrices."""
    return all(
        m.shape[0] > 0
        and m.shape[1] > 0
        and m.stride(1) == 1
        and m.stride(0) * m.element_size() % 16 == 0
        and m.data_ptr() % 16 == 0
        and (interpreting() or (m.element_size() == 2 and capability(m.device) >= (9, 0)))
        for m in matrices
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def depth_of(row_multiple: int) -> int | None:
    """Return the depth of a step that no unit's boundary falls into."""
    return next((depth for depth in DEPTHS if row_multiple % depth == 0), None)


def gram_parts(
    first: Tensor, g: Tensor, cu_seqlens: Tensor, longest: int, *, padding: int, **options: bool
) -> Tensor:
    """Sums of parts of `reference.gram_norm` (`reference.token_gram_norm` for tokens).

    Returns:
        float32 ``(2, U, parts)``: of the norms, and of the absolute values.
    """
    from shared_kernels.ops.dp import triton_tma

    kernel: Any = triton_tma.gram_kernel
    units, tokens = cu_seqlens.shape[0] - 1, first.dim() == 1
    config = GRAM | ({"BT": 64, "num_warps": 4} if longest <= 64 else {})
    blocks = ceil_div(longest, config["BT"])
    parts = max(1, min(blocks * (blocks + 1) // 2, ceil_div(2 * PROGRAMS, units)))
    sums = g.new_empty(2, units, parts, dtype=torch.float32)
    outputs = _descriptor(g, config["BT"], config["BK"])
    inputs = outputs if tokens else _descriptor(first, config["BT"], config["BK"])
    kernel[(units * parts,)](
        inputs,
        outputs,
        first if tokens else cu_seqlens,
        cu_seqlens,
        sums[0],
        sums[1],
        0 if tokens else first.shape[1],
        g.shape[1],
        parts,
        padding,
        LOST=reference.LOST,
        WIDEN=interpreting(),
        **options,
        **config,
    )
    return sums


def gram_clip(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    threshold: Tensor,
    out: Tensor,
    clipping: str,
    stability: float,
    longest: int,
    depth: int,
) -> Tensor:
    """See `reference.gram_clip`, without a bias: three launches."""
    from shared_kernels.ops.dp import triton_tma

    parts = gram_parts(
        a, g, cu_seqlens, longest, padding=0, BIAS=False, TOKENS=False, PADDING=False
    )
    units = cu_seqlens.shape[0] - 1
    n2, factors = g.new_empty(2, units, dtype=torch.float32)
    order = cu_seqlens.new_empty(units + 1)
    block = power_of_two(units)
    finish: Any = triton_tma.finish_kernel
    finish[(1,)](
        parts,
        cu_seqlens,
        threshold,
        n2,
        factors,
        order,
        units,
        parts.shape[2],
        reference.gram_steps(a.shape[1], g.shape[1]),
        stability,
        AUTOMATIC=clipping == "automatic",
        SHRINK=reference.SHRINK,
        EPS=torch.finfo(torch.float32).eps,
        MULTIPLE=depth,
        BLOCK=block,
        STEP=min(block, RANK_STEP),
        COLUMNS=max(1, 4096 // block),
        num_warps=8,
    )
    _ordered_scaled_mm(a, g, cu_seqlens, factors, order, out, depth)
    return n2


def mm_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor, depth: int) -> Tensor:
    """See `reference.mm_norm`, without a bias; NaN where a boundary is no multiple of depth."""
    from shared_kernels.ops.dp import triton_tma

    kernel: Any = triton_tma.product_kernel
    units = cu_seqlens.shape[0] - 1
    squares = g.new_empty(units, _tiles(a, g), dtype=torch.float32)
    _product(kernel, a, g, cu_seqlens, squares, None, depth)
    return torch.where((cu_seqlens % depth == 0).all(), squares.sum(1), float("nan"))


def products(a: Tensor, g: Tensor, cu_seqlens: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Write units' products out; boundaries must be multiples of ``depth``.

    Args:
        a: 16-bit ``(N, d)``.
        g: 16-bit ``(N, p)``.
        cu_seqlens: int32 ``(k + 1,)``, rows before each of k units and after the last.
        depth: See `depth_of`.

    Returns:
        The products, float32 ``(k, p, d)``, and squares whose sums over the second dimension are
        their squared norms, float32 ``(k, tiles)``.
    """
    from shared_kernels.ops.dp import triton_tma

    units = cu_seqlens.shape[0] - 1
    squares = g.new_empty(units, _tiles(a, g), dtype=torch.float32)
    out = g.new_empty(units, g.shape[1], a.shape[1], dtype=torch.float32)
    _product(triton_tma.product_kernel, a, g, cu_seqlens, squares, out, depth)
    return out, squares


def _product(
    kernel: Any, a: Tensor, g: Tensor, cu_seqlens: Tensor, squares: Tensor, out: Tensor | None,
    depth: int,
) -> None:  # fmt: skip
    kernel[(squares.numel(),)](
        _descriptor(a, depth, PRODUCT["BD"]),
        _descriptor(g, depth, PRODUCT["BP"]),
        cu_seqlens,
        squares,
        out,
        a.shape[1],
        g.shape[1],
        WIDEN=interpreting(),
        BK=depth,
        **PRODUCT,
    )


def _tiles(a: Tensor, g: Tensor) -> int:
    return ceil_div(g.shape[1], PRODUCT["BP"]) * ceil_div(a.shape[1], PRODUCT["BD"])


def scaled_mm(
    a: Tensor, g: Tensor, cu_seqlens: Tensor, scale: Tensor, out: Tensor, depth: int
) -> None:
    """See `reference.scaled_mm`, without a bias; NaN where a boundary is no multiple of depth."""
    from shared_kernels.ops.dp import triton_tma

    units = cu_seqlens.shape[0] - 1
    order = cu_seqlens.new_empty(units + 1)
    block = power_of_two(units)
    rank: Any = triton_tma.order_kernel
    rank[(1,)](
        scale, cu_seqlens, order, units, MULTIPLE=depth, BLOCK=block, STEP=min(block, RANK_STEP)
    )
    _ordered_scaled_mm(a, g, cu_seqlens, scale, order, out, depth)


def _ordered_scaled_mm(
    a: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    scale: Tensor,
    order: Tensor,
    out: Tensor,
    depth: int,
) -> None:
    from shared_kernels.ops.dp import triton_tma

    if out.stride(0) == 1 or a.shape[1] < PRODUCT["BD"] <= g.shape[1]:
        # the wide side of a tile lies along the output's rows
        a, g, out = g, a, out.t()
    units, tiles = cu_seqlens.shape[0] - 1, _tiles(a, g)
    splits = max(1, min(units, ONE_WAVE // tiles))
    parts = out[None] if splits == 1 else out.new_empty(splits, *out.shape)
    kernel: Any = triton_tma.scaled_mm_kernel
    kernel[(tiles * splits,)](
        _descriptor(a, depth, PRODUCT["BD"]),
        _descriptor(g, depth, PRODUCT["BP"]),
        cu_seqlens,
        order,
        scale,
        parts,
        units,
        a.shape[1],
        g.shape[1],
        *parts.stride(),
        splits,
        ADD=splits == 1,
        WIDEN=interpreting(),
        BK=depth,
        **PRODUCT,
    )
    if splits > 1:
        out += parts.sum(0)
