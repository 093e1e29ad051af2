"""Counter-based noise in Triton: device functions for other kernels, and the noise kernel.

A tile of 4096 elements is 16 rows of 256 columns. Programs work on *groups* of four rows: a tensor
index ``(i, j)`` stands for column ``8 * (i % 32) + j`` of group ``i // 32``, and four tensors hold
the four rows. A thread thus owns eight neighbouring columns: 16 bytes of bfloat16.

Launch with ``enable_fp_fusion=False``: the streams are defined without contraction, and every fused
multiply-add is written out.
"""

import triton
import triton.language as tl

from shared_kernels.random import constants as k

_M0 = tl.constexpr(k.PHILOX_M0)
_M1 = tl.constexpr(k.PHILOX_M1)
_W0 = tl.constexpr(k.PHILOX_W0)
_W1 = tl.constexpr(k.PHILOX_W1)
_ROUNDS = tl.constexpr(k.PHILOX_ROUNDS)
_DITHER = tl.constexpr(k.DOMAIN_DITHER << k.DOMAIN_SHIFT)
_TWO_M31 = tl.constexpr(k.TWO_M31)
_TWO_M32 = tl.constexpr(k.TWO_M32)
_ONE_BELOW = tl.constexpr(k.ONE_BELOW)
_SQRT_HALF = tl.constexpr(k.SQRT_HALF_BITS)
_MINUS_TWO_LN2 = tl.constexpr(k.MINUS_TWO_LN2)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7, _Q8 = (tl.constexpr(c) for c in k.LOG_Q)
_SIN0, _SIN1, _SIN2, _SIN3 = (tl.constexpr(c) for c in k.SIN_S)
_COS0, _COS1, _COS2, _COS3 = (tl.constexpr(c) for c in k.COS_C)


@triton.jit
def _mulhilo(a, multiplier: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        product = a.to(tl.uint64) * multiplier
        high = (product >> 32).to(tl.uint32)
        low = product.to(tl.uint32)
    else:
        high = tl.umulhi(a, multiplier)
        low = a * multiplier
    return high, low


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1, WIDE: tl.constexpr):
    """Return the four words of a block; all arguments uint32 tensors or scalars.

    WIDE takes the two halves of a product from one 64-bit multiply, instead of a high and a low
    32-bit multiply.
    """
    for _ in tl.static_range(_ROUNDS):
        hi0, lo0 = _mulhilo(c0, _M0, WIDE)
        hi1, lo1 = _mulhilo(c2, _M1, WIDE)
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _minus_two_log1p(f, exponent):
    q = tl.fma(f, _Q8, _Q7)
    q = tl.fma(q, f, _Q6)
    q = tl.fma(q, f, _Q5)
    q = tl.fma(q, f, _Q4)
    q = tl.fma(q, f, _Q3)
    q = tl.fma(q, f, _Q2)
    q = tl.fma(q, f, _Q1)
    q = tl.fma(q, f, _Q0)
    tail = tl.fma(f * f, q, f * -2.0)
    return tl.fma(exponent, _MINUS_TWO_LN2, tail)


@triton.jit
def minus_two_log(u):
    """See `reference.minus_two_log`."""
    shifted = u.to(tl.int32, bitcast=True) - _SQRT_HALF
    mantissa = ((shifted & 0x7FFFFF) + _SQRT_HALF).to(tl.float32, bitcast=True)
    return _minus_two_log1p(mantissa - 1.0, (shifted >> 23).to(tl.float32))


@triton.jit
def gumbel(word):
    """See `reference.gumbel`; ``word`` is uint32."""
    v = tl.fma((word >> 1).to(tl.int32).to(tl.float32), _TWO_M31, _TWO_M32)
    v = tl.minimum(v, _ONE_BELOW)
    w = 1.0 - v
    shifted = w.to(tl.int32, bitcast=True) - _SQRT_HALF
    mantissa = ((shifted & 0x7FFFFF) + _SQRT_HALF).to(tl.float32, bitcast=True)
    f = tl.where(shifted >= 0, -v, mantissa - 1.0)
    exponential = 0.5 * _minus_two_log1p(f, (shifted >> 23).to(tl.float32))
    return 0.5 * minus_two_log(exponential)


@triton.jit
def box_muller(word_radius, word_angle):
    """See `reference.box_muller`."""
    u = tl.fma((word_radius >> 1).to(tl.int32).to(tl.float32), _TWO_M31, _TWO_M32)
    radius = tl.sqrt_rn(minus_two_log(u))
    r = (word_angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * _TWO_M32
    r2 = r * r
    s = tl.fma(r2, _SIN3, _SIN2)
    s = tl.fma(s, r2, _SIN1)
    sine = r * tl.fma(s, r2, _SIN0)
    c = tl.fma(r2, _COS3, _COS2)
    c = tl.fma(c, r2, _COS1)
    cosine = tl.fma(r2, tl.fma(c, r2, _COS0), 1.0)
    sign = word_angle & 0x80000000
    cosine = (cosine.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    swap = (word_angle & 0x40000000) != 0
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def _sign(word, shift):
    bit = (word >> shift) & 1
    return (0xBF800000 ^ (bit << 31)).to(tl.float32, bitcast=True)


@triton.jit
def draw_groups(
    index,
    j,
    group0,
    uid,
    start_low,
    start_high,
    direction,
    k0,
    k1,
    GAUSSIAN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Draw groups of one tile.

    Args:
        index: int32 ``(32 * groups, 1)``, ``tl.arange``.
        j: int32 ``(1, 8)``, ``tl.arange``.
        group0: First group of the program.
        uid: uint32 scalar; so are ``start_low``, ``start_high`` (first element of the tile),
            ``direction``, ``k0`` and ``k1`` (step seed).
        start_low: See ``uid``.
        start_high: See ``uid``.
        direction: See ``uid``.
        k0: See ``uid``.
        k1: See ``uid``.
        GAUSSIAN: Normals, otherwise signs.
        WIDE: See `philox4x32`.

    Returns:
        Four float32 ``(32 * groups, 8)`` tensors, one per row of a group.
    """
    group = group0 + index // 32
    part = index % 32
    # a tile begins at a multiple of 1024 (32) blocks, so that the low word never carries
    if GAUSSIAN:
        low = (start_low >> 2) | (start_high << 30)
        block = low + (group * 256 + part * 8 + j).to(tl.uint32)
        w0, w1, w2, w3 = philox4x32(block, start_high >> 2, uid, direction, k0, k1, WIDE)
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
    else:
        low = (start_low >> 7) | (start_high << 25)
        block = low + part.to(tl.uint32)
        w0, w1, w2, w3 = philox4x32(block, start_high >> 7, uid, direction, k0, k1, WIDE)
        word = tl.where(group < 2, tl.where(group == 0, w0, w1), tl.where(group == 2, w2, w3))
        shift = j.to(tl.uint32)
        z0 = _sign(word, shift)
        z1 = _sign(word, shift + 8)
        z2 = _sign(word, shift + 16)
        z3 = _sign(word, shift + 24)
    return z0, z1, z2, z3


@triton.jit
def dither_groups(index, j, group0, uid, start_low, start_high, k0, k1, WIDE: tl.constexpr):
    """Draw the rounding dither of groups of one tile; arguments as in `draw_groups`.

    Returns:
        Four uint32 ``(32 * groups, 8)`` tensors with values in [0, 2^16).
    """
    group = group0 + index // 32
    low = (start_low >> 3) | (start_high << 29)
    block = low + ((group // 2) * 256 + (index % 32) * 8 + j).to(tl.uint32)
    direction = tl.full((), _DITHER, tl.uint32)
    w0, w1, w2, w3 = philox4x32(block, start_high >> 3, uid, direction, k0, k1, WIDE)
    odd = group % 2 == 1
    first = tl.where(odd, w2, w0)
    second = tl.where(odd, w3, w1)
    return first & 0xFFFF, first >> 16, second & 0xFFFF, second >> 16


# an argument that happens to be 1 would otherwise become a compile-time constant without .to()
@triton.jit(
    do_not_specialize=[
        "numel",
        "first_tile",
        "skip",
        "seed_low",
        "seed_high",
        "uid",
        "direction",
    ]
)
def noise_kernel(
    out_ptr,
    numel,
    first_tile,
    skip,
    seed_low,
    seed_high,
    uid,
    direction,
    GAUSSIAN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write stream elements ``first_tile * 4096 + skip ..`` to ``out``, a tile per program."""
    index = tl.arange(0, 128)[:, None]
    j = tl.arange(0, 8)[None, :]
    tile = tl.program_id(0).to(tl.int64)
    start = (first_tile.to(tl.int64) + tile) * 4096
    z0, z1, z2, z3 = draw_groups(
        index,
        j,
        0,
        uid.to(tl.uint32, bitcast=True),
        start.to(tl.uint32),
        (start >> 32).to(tl.uint32),
        direction.to(tl.uint32, bitcast=True),
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
        GAUSSIAN,
        WIDE,
    )
    column = (index // 32) * 1024 + (index % 32) * 8 + j
    element = tile * 4096 + column - skip
    tl.store(out_ptr + element, z0, mask=(element >= 0) & (element < numel))
    element += 256
    tl.store(out_ptr + element, z1, mask=(element >= 0) & (element < numel))
    element += 256
    tl.store(out_ptr + element, z2, mask=(element >= 0) & (element < numel))
    element += 256
    tl.store(out_ptr + element, z3, mask=(element >= 0) & (element < numel))
