"""ChaCha20 and secure normals in Triton: device functions, and the kernel that writes words.

Launch with ``enable_fp_fusion=False``: the normals are defined without contraction. Words are
uint32; kernels take keys, nonces and counters as int32 bit patterns.
"""

import triton
import triton.language as tl

from shared_kernels.random.chacha import constants as k

_SIGMA0, _SIGMA1, _SIGMA2, _SIGMA3 = (tl.constexpr(word) for word in k.SIGMA)
_DOUBLE_ROUNDS = tl.constexpr(k.DOUBLE_ROUNDS)
_COLUMNS = tl.constexpr(k.COLUMNS)
_BLOCK_SHIFT = tl.constexpr(k.BLOCK_SHIFT)
_TWO_M32 = tl.constexpr(k.TWO_M32)
_TWO_M62 = tl.constexpr(k.TWO_M62)
_TWO_M64 = tl.constexpr(k.TWO_M64)
_SQRT_HALF = tl.constexpr(k.SQRT_HALF_BITS)
_MANTISSA = tl.constexpr((1 << 52) - 1)
_MINUS_TWO_LN2 = tl.constexpr(k.MINUS_TWO_LN2)
_HALF_PI = tl.constexpr(k.HALF_PI)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (tl.constexpr(c) for c in k.LOG_L)
_SIN0, _SIN1, _SIN2, _SIN3, _SIN4, _SIN5, _SIN6, _SIN7 = (tl.constexpr(c) for c in k.SIN_S)
_COS0, _COS1, _COS2, _COS3, _COS4, _COS5, _COS6, _COS7, _COS8 = (tl.constexpr(c) for c in k.COS_C)


@triton.jit
def _quarter(a, b, c, d):
    a = a + b
    d = d ^ a
    d = (d << 16) | (d >> 16)
    c = c + d
    b = b ^ c
    b = (b << 12) | (b >> 20)
    a = a + b
    d = d ^ a
    d = (d << 8) | (d >> 24)
    c = c + d
    b = b ^ c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def chacha20_block(counter, n0, n1, n2, k0, k1, k2, k3, k4, k5, k6, k7):
    """Return the sixteen words of blocks.

    Args:
        counter: uint32 tensor of any shape.
        n0: uint32 scalar, nonce; so are ``n1`` and ``n2``, and ``k0`` to ``k7``, the key.
        n1: See ``n0``.
        n2: See ``n0``.
        k0: See ``n0``.
        k1: See ``n0``.
        k2: See ``n0``.
        k3: See ``n0``.
        k4: See ``n0``.
        k5: See ``n0``.
        k6: See ``n0``.
        k7: See ``n0``.
    """
    zero = counter ^ counter
    x0 = zero + _SIGMA0
    x1 = zero + _SIGMA1
    x2 = zero + _SIGMA2
    x3 = zero + _SIGMA3
    x4 = zero + k0
    x5 = zero + k1
    x6 = zero + k2
    x7 = zero + k3
    x8 = zero + k4
    x9 = zero + k5
    x10 = zero + k6
    x11 = zero + k7
    x12 = counter
    x13 = zero + n0
    x14 = zero + n1
    x15 = zero + n2
    for _ in range(_DOUBLE_ROUNDS):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    x0 += _SIGMA0
    x1 += _SIGMA1
    x2 += _SIGMA2
    x3 += _SIGMA3
    x4 += k0
    x5 += k1
    x6 += k2
    x7 += k3
    x8 += k4
    x9 += k5
    x10 += k6
    x11 += k7
    x12 += counter
    x13 += n0
    x14 += n1
    x15 += n2
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def minus_two_log(u):
    """See `reference.minus_two_log`."""
    shifted = u.to(tl.int64, bitcast=True) - _SQRT_HALF
    exponent = (shifted >> 52).to(tl.int32).to(tl.float64)
    mantissa = ((shifted & _MANTISSA) + _SQRT_HALF).to(tl.float64, bitcast=True)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    s2 = s * s
    p = (((s2 * _L8 + _L7) * s2 + _L6) * s2 + _L5) * s2 + _L4
    p = (((p * s2 + _L3) * s2 + _L2) * s2 + _L1) * s2 + _L0
    return exponent * _MINUS_TWO_LN2 + s * p


@triton.jit
def box_muller(radius_high, radius_low, angle_high, angle_low):
    """See `reference.box_muller`."""
    low = (radius_low.to(tl.float64) + 0.5) * _TWO_M64
    radius = tl.sqrt(minus_two_log(radius_high.to(tl.float64) * _TWO_M32 + low))
    signed = (angle_high << 2).to(tl.int32, bitcast=True).to(tl.float64)
    t = (signed * _TWO_M32 + (angle_low.to(tl.float64) + 0.5) * _TWO_M62) * _HALF_PI
    t2 = t * t
    s = (((t2 * _SIN7 + _SIN6) * t2 + _SIN5) * t2 + _SIN4) * t2 + _SIN3
    sine = t * (((s * t2 + _SIN2) * t2 + _SIN1) * t2 + _SIN0)
    c = (((t2 * _COS8 + _COS7) * t2 + _COS6) * t2 + _COS5) * t2 + _COS4
    cosine = (((c * t2 + _COS3) * t2 + _COS2) * t2 + _COS1) * t2 + _COS0
    cosine = tl.where((angle_high & 0x80000000) != 0, -cosine, cosine)
    swap = (angle_high & 0x40000000) != 0
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def normal_segment(segment, n0, n1, n2, k0, k1, k2, k3, k4, k5, k6, k7):
    """Draw the eight lanes of a segment.

    Args:
        segment: int64 scalar.
        n0: Nonce and key as in `chacha20_block`; ``n1`` must have zeros where the high part of the
            block index belongs.
        n1: See ``n0``.
        n2: See ``n0``.
        k0: See ``n0``.
        k1: See ``n0``.
        k2: See ``n0``.
        k3: See ``n0``.
        k4: See ``n0``.
        k5: See ``n0``.
        k6: See ``n0``.
        k7: See ``n0``.

    Returns:
        Eight float64 ``(256,)`` tensors.
    """
    block = segment * _COLUMNS
    # a segment begins at a multiple of its number of blocks, so that the low word never carries
    counter = block.to(tl.uint32) + tl.arange(0, _COLUMNS).to(tl.uint32)
    n1 = n1 | ((block >> 32).to(tl.uint32) << _BLOCK_SHIFT)
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = chacha20_block(
        counter, n0, n1, n2, k0, k1, k2, k3, k4, k5, k6, k7
    )
    z0, z1 = box_muller(w0, w1, w2, w3)
    z2, z3 = box_muller(w4, w5, w6, w7)
    z4, z5 = box_muller(w8, w9, w10, w11)
    z6, z7 = box_muller(w12, w13, w14, w15)
    return z0, z1, z2, z3, z4, z5, z6, z7


# an argument that happens to be 1 would otherwise become a compile-time constant without .to()
@triton.jit(do_not_specialize=["blocks", "counter", "n0", "n1", "n2"] + [f"k{i}" for i in range(8)])
def words_kernel(
    out_ptr, blocks, counter, n0, n1, n2, k0, k1, k2, k3, k4, k5, k6, k7, BLOCK: tl.constexpr
):
    """Write blocks ``counter ..`` to the rows of ``out``, int32 ``(blocks, 16)``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = chacha20_block(
        counter.to(tl.uint32, bitcast=True) + row.to(tl.uint32),
        n0.to(tl.uint32, bitcast=True),
        n1.to(tl.uint32, bitcast=True),
        n2.to(tl.uint32, bitcast=True),
        k0.to(tl.uint32, bitcast=True),
        k1.to(tl.uint32, bitcast=True),
        k2.to(tl.uint32, bitcast=True),
        k3.to(tl.uint32, bitcast=True),
        k4.to(tl.uint32, bitcast=True),
        k5.to(tl.uint32, bitcast=True),
        k6.to(tl.uint32, bitcast=True),
        k7.to(tl.uint32, bitcast=True),
    )
    out = out_ptr + row * 16
    mask = row < blocks
    tl.store(out, w0.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 1, w1.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 2, w2.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 3, w3.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 4, w4.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 5, w5.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 6, w6.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 7, w7.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 8, w8.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 9, w9.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 10, w10.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 11, w11.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 12, w12.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 13, w13.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 14, w14.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 15, w15.to(tl.int32, bitcast=True), mask=mask)
