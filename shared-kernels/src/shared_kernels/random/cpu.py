"""Counter-based noise on the CPU: numba, bit-equal to the reference.

Every loop runs over the 256 columns of a planar segment with unit stride and no branches, so that
LLVM turns it into SIMD: that is what the planar layout is for. Fused multiply-adds are the LLVM
intrinsic; nothing else is ever contracted, because numba's default (no fastmath) forbids it.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from shared_kernels._parallel import parallel_for
from shared_kernels.random import constants as k

_U64 = np.uint64
_F32 = np.float32
_MASK = _U64(0xFFFFFFFF)
_M0, _M1 = _U64(k.PHILOX_M0), _U64(k.PHILOX_M1)
_W0, _W1 = _U64(k.PHILOX_W0), _U64(k.PHILOX_W1)
_S32, _S7, _S3, _S2 = _U64(32), _U64(7), _U64(3), _U64(2)
_IN_TILE = _U64(k.TILE - 1)
_DITHER = _U64(k.DOMAIN_DITHER << k.DOMAIN_SHIFT)
_BIT, _SIGN_SHIFT, _MINUS_ONE_BITS = np.uint32(1), np.uint32(31), np.uint32(0xBF800000)
_TWO_M31, _TWO_M32 = _F32(k.TWO_M31), _F32(k.TWO_M32)
_ONE, _HALF, _ONE_BELOW = _F32(1), _F32(0.5), _F32(k.ONE_BELOW)
_MINUS_TWO, _MINUS_TWO_LN2 = _F32(-2), _F32(k.MINUS_TWO_LN2)
_SQRT_HALF = np.int32(k.SQRT_HALF_BITS)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7, _Q8 = (_F32(c) for c in k.LOG_Q)
_SIN0, _SIN1, _SIN2, _SIN3 = (_F32(c) for c in k.SIN_S)
_COS0, _COS1, _COS2, _COS3 = (_F32(c) for c in k.COS_C)

#: uint32 words and float32 values a thread needs as working space for one tile.
SCRATCH_WORDS = 4 * k.COLUMNS

helper = njit(nogil=True, cache=True, error_model="numpy")


@intrinsic
def fma(typingctx, a, b, c):
    """Correctly rounded float32 ``a * b + c``."""

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def float_bits(typingctx, x):
    """Bit pattern of a float32 as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def bits_float(typingctx, x):
    """Float32 of an int32 bit pattern."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@helper
def philox_columns(block, count, c2, c3, k0, k1, words):
    """Write words 0..3 of blocks ``block .. block + count`` to the four rows of ``words``.

    64-bit lanes hold 32-bit words whose upper half is not kept clean: only the masked value enters
    a product, and a product of two masked values is one widening SIMD multiply.
    """
    # a segment begins at a multiple of its number of blocks, so that the low word never carries
    low = block & _MASK
    high = block >> _S32
    for j in range(count):
        x0 = low + _U64(j)
        x1 = high
        x2 = c2
        x3 = c3
        key0 = k0
        key1 = k1
        for _ in range(10):
            p0 = (x0 & _MASK) * _M0
            p1 = (x2 & _MASK) * _M1
            x0 = (p1 >> _S32) ^ x1 ^ key0
            x2 = (p0 >> _S32) ^ x3 ^ key1
            x1 = p1
            x3 = p0
            key0 = key0 + _W0
            key1 = key1 + _W1
        words[j] = np.uint32(x0 & _MASK)
        words[256 + j] = np.uint32(x1 & _MASK)
        words[512 + j] = np.uint32(x2 & _MASK)
        words[768 + j] = np.uint32(x3 & _MASK)


@helper
def minus_two_log1p(f, exponent):
    """See `reference.minus_two_log`."""
    q = fma(fma(fma(fma(_Q8, f, _Q7), f, _Q6), f, _Q5), f, _Q4)
    q = fma(fma(fma(fma(q, f, _Q3), f, _Q2), f, _Q1), f, _Q0)
    tail = fma(f * f, q, f * _MINUS_TWO)
    return fma(exponent, _MINUS_TWO_LN2, tail)


@helper
def minus_two_log(u):
    """See `reference.minus_two_log`."""
    shifted = np.int32(float_bits(u) - _SQRT_HALF)
    mantissa = bits_float(np.int32((shifted & 0x7FFFFF) + _SQRT_HALF))
    return minus_two_log1p(mantissa - _ONE, _F32(np.int32(shifted >> 23)))


@helper
def gumbel(word):
    """See `reference.gumbel`; ``word`` is uint32."""
    v = fma(_F32(np.int32(word >> 1)), _TWO_M31, _TWO_M32)
    v = min(v, _ONE_BELOW)
    w = _ONE - v
    shifted = np.int32(float_bits(w) - _SQRT_HALF)
    mantissa = bits_float(np.int32((shifted & 0x7FFFFF) + _SQRT_HALF))
    f = -v if shifted >= 0 else mantissa - _ONE
    exponential = _HALF * minus_two_log1p(f, _F32(np.int32(shifted >> 23)))
    return _HALF * minus_two_log(exponential)


@helper
def box_muller_columns(words, z):
    """Turn two rows of ``words`` into two rows of normals."""
    for j in range(256):
        word_a = words[j]
        word_b = words[256 + j]
        u = fma(_F32(np.int32(word_a >> 1)), _TWO_M31, _TWO_M32)
        radius = _F32(math.sqrt(minus_two_log(u)))
        r = _F32(np.int32(word_b << 2)) * _TWO_M32
        r2 = r * r
        sine = r * fma(fma(fma(_SIN3, r2, _SIN2), r2, _SIN1), r2, _SIN0)
        cosine = fma(r2, fma(fma(fma(_COS3, r2, _COS2), r2, _COS1), r2, _COS0), _ONE)
        sign = np.int32(word_b & np.uint32(0x80000000))
        cosine = bits_float(np.int32(float_bits(cosine) ^ sign))
        swap = word_b & np.uint32(0x40000000) != 0
        z[j] = radius * (sine if swap else cosine)
        z[256 + j] = radius * (cosine if swap else sine)


@helper
def gaussian_tile(start, uid, c3, k0, k1, words, z):
    """Draw the 4096 normals of the tile at logical element ``start`` into ``z``."""
    block = start >> _S2
    for segment in range(4):
        philox_columns(block + _U64(segment * 256), 256, uid, c3, k0, k1, words)
        # slices, not offsets: numba would test an offset for negative indexing inside the loop
        row = z[segment * 1024 : segment * 1024 + 1024]
        box_muller_columns(words, row)
        box_muller_columns(words[512:], row[512:])


@helper
def rademacher_tile(start, uid, c3, k0, k1, words, z):
    """Draw the 4096 signs of the tile at logical element ``start`` into ``z``."""
    philox_columns(start >> _S7, 32, uid, c3, k0, k1, words)
    for word in range(4):
        columns = words[word * 256 : word * 256 + 256]
        # one word serves eight columns: spread it, last first because this is in place
        for block in range(31, -1, -1):
            spread = columns[block]
            for j in range(8):
                columns[block * 8 + j] = spread
        for row in range(4):
            low = (word * 4 + row) * 256
            row_z = z[low : low + 256]
            shift = np.uint32(row * 8)
            for j in range(256):
                bit = (columns[j] >> (shift + np.uint32(j & 7))) & _BIT
                row_z[j] = bits_float(np.int32(_MINUS_ONE_BITS ^ np.uint32(bit << _SIGN_SHIFT)))


@helper
def dither_tile(start, uid, k0, k1, words, dither):
    """Draw the 4096 16-bit dithers of the tile at logical element ``start`` into ``dither``."""
    for segment in range(2):
        block = (start >> _S3) + _U64(segment * 256)
        philox_columns(block, 256, uid, _DITHER, k0, k1, words)
        for half in range(4):
            row_words = words[half * 256 : half * 256 + 256]
            low = segment * 2048 + half * 512
            row = dither[low : low + 512]
            for j in range(256):
                row[j] = np.uint16(row_words[j] & np.uint32(0xFFFF))
                row[256 + j] = np.uint16(row_words[j] >> np.uint32(16))


@helper
def draw_tile(gaussian, start, uid, direction, seed, words, z):
    """Draw one tile of perturbation noise into ``z`` (float32, 4096)."""
    k0 = seed & _MASK
    k1 = seed >> _S32
    if gaussian:
        gaussian_tile(start, uid, direction, k0, k1, words, z)
    else:
        rademacher_tile(start, uid, direction, k0, k1, words, z)


@njit(
    "void(boolean, uint64, uint64, uint64, uint64, uint32[::1], float32[::1], float32[::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
def fill_noise(gaussian, start, uid, direction, seed, words, z, out):
    """Write elements ``start .. start + len(out)`` of a stream; ``z`` is scratch for one tile."""
    done = 0
    total = out.shape[0]
    while done < total:
        element = start + _U64(done)
        skip = np.int64(element & _IN_TILE)
        take = min(4096 - skip, total - done)
        if take == 4096:
            draw_tile(gaussian, element, uid, direction, seed, words, out[done : done + 4096])
        else:
            draw_tile(gaussian, element - _U64(skip), uid, direction, seed, words, z)
            out[done : done + take] = z[skip : skip + take]
        done += take


def noise_(out: Tensor, *, seed: int, uid: int, direction: int, dist: str, start: int) -> None:
    """Fill the contiguous float32 CPU tensor ``out`` with elements of a stream; see `api.noise`."""
    flat = out.numpy()

    def fill(low: int, high: int) -> None:
        fill_noise(
            dist == "gaussian",
            start + low,
            uid,
            direction,
            seed,
            np.empty(SCRATCH_WORDS, np.uint32),
            np.empty(k.TILE, np.float32),
            flat[low:high],
        )

    # cut at tile boundaries of the stream, so that no tile is drawn twice
    first, last = start // k.TILE, -(-(start + flat.size) // k.TILE)
    clip = lambda tile: min(max(tile * k.TILE - start, 0), flat.size)  # noqa: E731
    parallel_for(last - first, lambda a, b: fill(clip(first + a), clip(first + b)))
