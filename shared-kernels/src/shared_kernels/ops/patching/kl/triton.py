"""Divergences in Triton: rows times the whole vocabulary, of which sums alone are kept.

A float32 number is two float16 ones, 22 bits, once it is scaled by a power of two; the product of
two numbers is then three products on tensor cores, at twice the speed of TF32 of the same accuracy.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
#: Above it terms are added up relative to the largest, 2^60 times as large, so that the smallest
#: probabilities that float32 has can count.
_FAR = tl.constexpr(60.0)
_LIFT = tl.constexpr(60.0)


@triton.jit
def _exponent(size):
    """Return the exponent bits of the power of two that takes ``size`` to ``[2^14, 2^15)``."""
    field = (size.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.minimum(tl.maximum(268 - field, 1), 253)


@triton.jit
def _power(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def rows_kernel(
    delta_ptr,
    mean_ptr,
    centre_ptr,
    parts_ptr,
    factor_ptr,
    bias_ptr,
    count,
    variants,
    width,
    padded,
    plane,
    variant_stride,
    example_stride,
    scale,
    COLS: tl.constexpr,
):
    """Split one row into two float16 planes, with its scale and its product with the mean.

    Row ``n variants + m`` is ``delta[m, n]``, so that rows side by side share a law. Rows from
    ``count`` on, and columns from ``width`` on, fill tiles with zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    end = tl.where(row < count, width, 0)
    example = row // variants
    delta_ptr += (row % variants) * variant_stride + example * example_stride
    size = tl.zeros((COLS,), tl.float32)
    bias = tl.zeros((COLS,), tl.float64)
    for low in range(0, end, COLS):
        column = low + tl.arange(0, COLS)
        inside = column < end
        x = tl.load(delta_ptr + column, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + example * width + column, mask=inside, other=0.0)
        centre = tl.load(centre_ptr + column, mask=inside, other=0.0)
        size = tl.maximum(size, tl.abs(x))
        bias += x.to(tl.float64) * (mean - centre).to(tl.float64)
    exponent = _exponent(tl.max(size, 0))
    for low in range(0, padded, COLS):
        column = low + tl.arange(0, COLS)
        x = tl.load(delta_ptr + column, mask=column < end, other=0.0)
        high, rest = _split(x * _power(exponent))
        place = parts_ptr + row * padded + column
        tl.store(place, high, mask=column < padded)
        tl.store(place + plane, rest, mask=column < padded)
    tl.store(factor_ptr + row, _power(254 - exponent) * scale)
    tl.store(bias_ptr + row, (tl.sum(bias, 0) * scale).to(tl.float32))


@triton.jit(do_not_specialize=["first", "vocabulary"])
def words_kernel(
    weight_ptr,
    centre_ptr,
    size_ptr,
    parts_ptr,
    first,
    vocabulary,
    width,
    padded,
    plane,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Split the head's rows from ``first`` on, less the centre, into two float16 planes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = column < width
    known = (first + row < vocabulary)[:, None] & inside[None, :]
    w = tl.load(
        weight_ptr + (first + row)[:, None] * width + column[None, :], mask=known, other=0.0
    )
    centre = tl.load(centre_ptr + column, mask=inside, other=0.0)
    w = tl.where(known, w.to(tl.float32) - centre[None, :], 0.0)
    high, rest = _split(w * _power(_exponent(tl.load(size_ptr))))
    place = parts_ptr + row[:, None] * padded + column[None, :]
    tl.store(place, high, mask=(column < padded)[None, :])
    tl.store(place + plane, rest, mask=(column < padded)[None, :])


@triton.jit
def _excess(t):
    """Return ``e^t - 1 - t``: of its series as much as float32 can tell below 1/2."""
    near = 1.0 + t * (1.0 / 8) * (1.0 + t * (1.0 / 9))
    near = 1.0 + t * (1.0 / 6) * (1.0 + t * (1.0 / 7) * near)
    near = 0.5 * t * t * (1.0 + t * (1.0 / 3) * (1.0 + t * 0.25 * (1.0 + t * 0.2 * near)))
    return tl.where(tl.abs(t) < 0.5, near, tl.exp2(t * _LOG2E) - 1.0 - t)


@triton.jit(do_not_specialize=["first", "vocabulary"])
def divergence_kernel(
    rows_ptr,
    words_ptr,
    law_ptr,
    factor_ptr,
    bias_ptr,
    size_ptr,
    state_ptr,
    count,
    variants,
    first,
    vocabulary,
    law_stride,
    padded,
    rows_plane,
    words_plane,
    TILES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Multiply M rows with TILES tiles of N tokens, from token ``first`` on, and keep three sums.

    Of ``p excess(t)`` where t is at most 60, and where it is more the largest t and the sum of
    ``2^60 p e^(t - largest)``; they go to ``state (parts, 3, rows)``. Planes and law are whole
    tiles, so that loads of them need no mask; tokens that fill up have the probability 0.
    """
    row = tl.program_id(0) * M + tl.arange(0, M)
    part = tl.program_id(1).to(tl.int64)
    here = row < count
    example = tl.minimum(row, count - 1) // variants
    k = tl.arange(0, K)
    rows_ptr += row.to(tl.int64)[:, None] * padded + k[None, :]
    law_ptr += example.to(tl.int64)[:, None] * law_stride + first + tl.arange(0, N)[None, :]
    factor = tl.load(factor_ptr + row) * _power(254 - _exponent(tl.load(size_ptr)))
    bias = tl.load(bias_ptr + row)
    total = tl.zeros((M,), tl.float32)
    peak = tl.full((M,), float("-inf"), tl.float32)
    high = tl.zeros((M,), tl.float32)
    start = part * TILES * N
    end = tl.minimum(start + TILES * N, vocabulary - first)
    for low_word in range(start, end, N):
        words = words_ptr + (low_word + tl.arange(0, N))[None, :] * padded + k[:, None]
        z = tl.zeros((M, N), tl.float32)
        for low in range(0, padded, K):
            a = tl.load(rows_ptr + low)
            a_rest = tl.load(rows_ptr + rows_plane + low)
            b = tl.load(words + low)
            b_rest = tl.load(words + words_plane + low)
            # tensor cores cut sums off: short ones are added up by units that round
            near = tl.dot(a, b_rest)
            near = tl.dot(a_rest, b, near)
            z += tl.dot(a, b, near)
        p = tl.load(law_ptr + low_word)
        # a token that is impossible has no say in what the largest t is
        t = tl.where(p > 0.0, z * factor[:, None] - bias[:, None], 0.0)
        far = t > _FAR
        total += tl.sum(p * _excess(tl.where(far, 0.0, t)), 1)
        if tl.max(tl.max(t, 1), 0) > _FAR:
            t = tl.where(far, t, float("-inf"))
            higher = tl.maximum(peak, tl.max(t, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            high *= tl.exp2((peak - safe) * _LOG2E)
            high += tl.sum(p * tl.exp2((t - safe[:, None]) * _LOG2E + _LIFT), 1)
            peak = higher
    # parts of earlier chunks of the vocabulary come first
    part += first // (TILES * N)
    state_ptr += part * 3 * count + row
    tl.store(state_ptr, total, mask=here)
    tl.store(state_ptr + count, peak, mask=here)
    tl.store(state_ptr + 2 * count, high, mask=here)


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(state_ptr, sums_ptr, count, parts, ROWS: tl.constexpr):
    """Merge the parts of ROWS rows in their order into ``sums (3, rows)``, adding in float64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < count
    total = tl.zeros((ROWS,), tl.float64)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    high = tl.zeros((ROWS,), tl.float64)
    state_ptr += row
    sums_ptr += row
    for _ in range(parts):
        total += tl.load(state_ptr, mask=here, other=0.0).to(tl.float64)
        its_peak = tl.load(state_ptr + count, mask=here, other=float("-inf"))
        its_high = tl.load(state_ptr + 2 * count, mask=here, other=0.0)
        higher = tl.maximum(peak, its_peak)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        high *= tl.exp2((peak - safe) * _LOG2E).to(tl.float64)
        high += (its_high * tl.exp2((its_peak - safe) * _LOG2E)).to(tl.float64)
        peak = higher
        state_ptr += 3 * count
    tl.store(sums_ptr, total.to(tl.float32), mask=here)
    tl.store(sums_ptr + count, peak, mask=here)
    tl.store(sums_ptr + 2 * count, high.to(tl.float32), mask=here)
