"""The noise step in Triton: one pass, noise drawn in registers, a segment per program."""

import triton
import triton.language as tl

from shared_kernels.ops.dp.noise import constants as k
from shared_kernels.random.chacha.triton import normal_segment

_GRID = tl.constexpr(k.GRID)
_COLUMNS = tl.constexpr(9)


@triton.jit
def _lane(total_ptr, out_ptr, element, numel, z, to_grid, from_grid, NOISE: tl.constexpr):
    mask = (element >= 0) & (element < numel)
    value = tl.load(total_ptr + element, mask=mask, other=0.0).to(tl.float64)
    noised = tl.floor(value * to_grid + z * _GRID + 0.5) * from_grid
    value = noised if NOISE else value / from_grid
    if out_ptr.dtype.element_ty == tl.float64:
        tl.store(out_ptr + element, value, mask=mask)
    else:
        tl.store(out_ptr + element, value.to(tl.float32).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_of(table_ptr, count, program, BITS: tl.constexpr):
    """Return where the row begins whose programs hold ``program``."""
    low = tl.zeros((), tl.int32)
    high = low + count
    for _ in range(BITS):
        middle = (low + high) // 2
        inside = tl.load(table_ptr + middle * _COLUMNS, mask=middle < count, other=0) <= program
        low = tl.where((middle < high) & inside, middle, low)
        high = tl.where((middle < high) & ~inside, middle, high)
    return table_ptr + low * _COLUMNS


# an argument that happens to be 1 would otherwise become a compile-time constant without .to()
@triton.jit(do_not_specialize=["count", "n0", "n1", *(f"k{i}" for i in range(8))])
def gaussian_steps_kernel(
    total_ptr,
    out_ptr,
    table_ptr,
    count,
    n0,
    n1,
    k0,
    k1,
    k2,
    k3,
    k4,
    k5,
    k6,
    k7,
    BITS: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Noise one segment of one of ``count`` parameters.

    ``total_ptr`` and ``out_ptr`` give the types of pointers only. A row of the table, int64
    ``(count, 9)``, holds: the parameter's first program, the addresses of total and result (which
    may be equal), their elements, the segment of the first element and its place in it, the third
    word of the nonce, and the bit patterns of ``to_grid`` and ``from_grid``; without NOISE,
    ``from_grid`` is the divisor.
    """
    program = tl.program_id(0).to(tl.int64)
    row = _row_of(table_ptr, count, program, BITS)
    program -= tl.load(row)
    total_ptr = tl.load(row + 1).to(total_ptr.dtype)
    out_ptr = tl.load(row + 2).to(out_ptr.dtype)
    numel = tl.load(row + 3)
    first_segment = tl.load(row + 4)
    skip = tl.load(row + 5)
    n2 = tl.load(row + 6).to(tl.uint32)
    to_grid = tl.load(row + 7).to(tl.float64, bitcast=True)
    from_grid = tl.load(row + 8).to(tl.float64, bitcast=True)
    element = program * 2048 + tl.arange(0, 256) - skip
    if NOISE:
        z0, z1, z2, z3, z4, z5, z6, z7 = normal_segment(
            first_segment + program,
            n0.to(tl.uint32, bitcast=True),
            n1.to(tl.uint32, bitcast=True),
            n2,
            k0.to(tl.uint32, bitcast=True),
            k1.to(tl.uint32, bitcast=True),
            k2.to(tl.uint32, bitcast=True),
            k3.to(tl.uint32, bitcast=True),
            k4.to(tl.uint32, bitcast=True),
            k5.to(tl.uint32, bitcast=True),
            k6.to(tl.uint32, bitcast=True),
            k7.to(tl.uint32, bitcast=True),
        )
    else:
        z0, z1, z2, z3 = 0.0, 0.0, 0.0, 0.0
        z4, z5, z6, z7 = 0.0, 0.0, 0.0, 0.0
    _lane(total_ptr, out_ptr, element, numel, z0, to_grid, from_grid, NOISE)
    _lane(total_ptr, out_ptr, element + 256, numel, z1, to_grid, from_grid, NOISE)
    _lane(total_ptr, out_ptr, element + 512, numel, z2, to_grid, from_grid, NOISE)
    _lane(total_ptr, out_ptr, element + 768, numel, z3, to_grid, from_grid, NOISE)
    _lane(total_ptr, out_ptr, element + 1024, numel, z4, to_grid, from_grid, NOISE)
    _lane(total_ptr, out_ptr, element + 1280, numel, z5, to_grid, from_grid, NOISE)
    _lane(total_ptr, out_ptr, element + 1536, numel, z6, to_grid, from_grid, NOISE)
    _lane(total_ptr, out_ptr, element + 1792, numel, z7, to_grid, from_grid, NOISE)
