"""ChaCha20 and secure normals on the CPU: numba, bit-equal to the reference.

Every loop runs over the 256 columns of a segment with unit stride and no branches, so that LLVM
turns it into SIMD: that is what the planar layout is for. Nothing is contracted, because numba's
default (no fastmath) forbids it.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from shared_kernels._parallel import parallel_for
from shared_kernels.random.chacha import constants as k

_U32, _U64, _F64 = np.uint32, np.uint64, np.float64
_SIGMA0, _SIGMA1, _SIGMA2, _SIGMA3 = (_U32(word) for word in k.SIGMA)
_TWO, _CENTRE, _S32 = _U32(2), _F64(0.5), _U64(32)
_SIGN, _SWAP = _U32(0x80000000), _U32(0x40000000)
_BLOCK_SHIFT = _U32(k.BLOCK_SHIFT)
_TWO_M32, _TWO_M62, _TWO_M64 = _F64(k.TWO_M32), _F64(k.TWO_M62), _F64(k.TWO_M64)
_ONE, _HALF_PI, _MINUS_TWO_LN2 = _F64(1), _F64(k.HALF_PI), _F64(k.MINUS_TWO_LN2)
_SQRT_HALF, _MANTISSA = np.int64(k.SQRT_HALF_BITS), np.int64((1 << 52) - 1)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (_F64(c) for c in k.LOG_L)
_SIN0, _SIN1, _SIN2, _SIN3, _SIN4, _SIN5, _SIN6, _SIN7 = (_F64(c) for c in k.SIN_S)
_COS0, _COS1, _COS2, _COS3, _COS4, _COS5, _COS6, _COS7, _COS8 = (_F64(c) for c in k.COS_C)

helper = njit(nogil=True, cache=True, error_model="numpy")


@intrinsic
def double_bits(typingctx, x):
    """Bit pattern of a float64 as int64."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), codegen


@intrinsic
def bits_double(typingctx, x):
    """Float64 of an int64 bit pattern."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@helper
def _rotl(x, left, right):
    return _U32(_U32(x << _U32(left)) | _U32(x >> _U32(right)))


@helper
def _quarter(a, b, c, d):
    a = _U32(a + b)
    d = _rotl(_U32(d ^ a), 16, 16)
    c = _U32(c + d)
    b = _rotl(_U32(b ^ c), 12, 20)
    a = _U32(a + b)
    d = _rotl(_U32(d ^ a), 8, 24)
    c = _U32(c + d)
    b = _rotl(_U32(b ^ c), 7, 25)
    return a, b, c, d


@helper
def chacha_columns(state, counter, count, words):
    """Write blocks ``counter .. counter + count`` to the columns of ``words``.

    A double round is one loop over the columns: its sixteen words stay in registers, and the rows
    stay in the first-level cache in between.

    Args:
        state: uint32 ``(16,)``: constants, key, an ignored word, nonce.
        counter: uint32, of column 0.
        count: At most 256.
        words: uint32 ``(16 * 256,)``, a row of 256 columns for each of the sixteen words.
    """
    for word in range(16):
        row = words[word * 256 : word * 256 + 256]
        for j in range(256):
            row[j] = state[word]
    for j in range(256):
        words[3072 + j] = _U32(counter + _U32(j))
    for _ in range(10):
        for j in range(count):
            x0, x4, x8, x12 = _quarter(words[j], words[1024 + j], words[2048 + j], words[3072 + j])
            x1, x5, x9, x13 = _quarter(
                words[256 + j], words[1280 + j], words[2304 + j], words[3328 + j]
            )
            x2, x6, x10, x14 = _quarter(
                words[512 + j], words[1536 + j], words[2560 + j], words[3584 + j]
            )
            x3, x7, x11, x15 = _quarter(
                words[768 + j], words[1792 + j], words[2816 + j], words[3840 + j]
            )
            x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
            x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
            x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
            x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
            words[j] = x0
            words[256 + j] = x1
            words[512 + j] = x2
            words[768 + j] = x3
            words[1024 + j] = x4
            words[1280 + j] = x5
            words[1536 + j] = x6
            words[1792 + j] = x7
            words[2048 + j] = x8
            words[2304 + j] = x9
            words[2560 + j] = x10
            words[2816 + j] = x11
            words[3072 + j] = x12
            words[3328 + j] = x13
            words[3584 + j] = x14
            words[3840 + j] = x15
    for word in range(16):
        row = words[word * 256 : word * 256 + 256]
        for j in range(256):
            row[j] = _U32(row[j] + state[word])
    for j in range(256):
        # the row of counters has had the ignored word of the state added
        words[3072 + j] = _U32(_U32(words[3072 + j] - state[12]) + _U32(counter + _U32(j)))


@helper
def minus_two_log(u):
    """See `reference.minus_two_log`."""
    shifted = double_bits(u) - _SQRT_HALF
    exponent = _F64(np.int32(shifted >> 52))
    mantissa = bits_double((shifted & _MANTISSA) + _SQRT_HALF)
    s = (mantissa - _ONE) / (mantissa + _ONE)
    s2 = s * s
    p = (((_L8 * s2 + _L7) * s2 + _L6) * s2 + _L5) * s2 + _L4
    p = (((p * s2 + _L3) * s2 + _L2) * s2 + _L1) * s2 + _L0
    return exponent * _MINUS_TWO_LN2 + s * p


@helper
def box_muller_columns(words, z):
    """Turn four rows of ``words`` into two rows of normals."""
    for j in range(256):
        angle = words[512 + j]
        u = _F64(words[j]) * _TWO_M32 + (_F64(words[256 + j]) + _CENTRE) * _TWO_M64
        radius = math.sqrt(minus_two_log(u))
        signed = _F64(np.int32(_U32(angle << _TWO)))
        r = signed * _TWO_M32 + (_F64(words[768 + j]) + _CENTRE) * _TWO_M62
        t = r * _HALF_PI
        t2 = t * t
        s = (((_SIN7 * t2 + _SIN6) * t2 + _SIN5) * t2 + _SIN4) * t2 + _SIN3
        sine = t * (((s * t2 + _SIN2) * t2 + _SIN1) * t2 + _SIN0)
        c = (((_COS8 * t2 + _COS7) * t2 + _COS6) * t2 + _COS5) * t2 + _COS4
        cosine = (((c * t2 + _COS3) * t2 + _COS2) * t2 + _COS1) * t2 + _COS0
        cosine = -cosine if angle & _SIGN != 0 else cosine
        swap = angle & _SWAP != 0
        z[j] = radius * (sine if swap else cosine)
        z[256 + j] = radius * (cosine if swap else sine)


@helper
def normal_segment(state, segment, words, z):
    """Draw the 2048 normals of a segment into ``z``.

    Args:
        state: uint32 ``(16,)`` from `initial_state`; its second nonce word must have zeros where
            the high part of the block index belongs.
        segment: uint64 index of the segment.
        words: uint32 ``(4096,)``, scratch.
        z: float64 ``(2048,)``, written.
    """
    block = segment * _U64(256)
    nonce = state[14]
    state[14] = _U32(nonce | _U32(_U32(block >> _S32) << _BLOCK_SHIFT))
    chacha_columns(state, _U32(block), 256, words)
    state[14] = nonce
    for pair in range(4):
        rows = words[pair * 1024 : pair * 1024 + 1024]
        box_muller_columns(rows, z[pair * 512 : pair * 512 + 512])


@njit("void(uint32[::1], uint32, uint32[:, ::1])", nogil=True, cache=True, error_model="numpy")
def _fill_words(state, counter, out):
    words = np.empty(4096, np.uint32)
    for low in range(0, out.shape[0], 256):
        count = min(256, out.shape[0] - low)
        chacha_columns(state, _U32(counter + _U32(low)), count, words)
        for j in range(count):
            for word in range(16):
                out[low + j, word] = words[word * 256 + j]


def initial_state(key: list[int], nonce: tuple[int, ...]) -> np.ndarray:
    """Return the sixteen words that a block begins with, its counter 0."""
    return np.array([*k.SIGMA, *key, 0, *nonce], np.uint32)


def chacha20_words_(out: Tensor, *, key: list[int], nonce: tuple[int, ...], counter: int) -> None:
    """Fill the contiguous int32 CPU tensor ``out`` ``(blocks, 16)``; see `api.chacha20_words`."""
    rows = out.numpy().view(np.uint32)
    state = initial_state(key, nonce)

    def fill(first: int, last: int) -> None:
        low, high = first * k.COLUMNS, min(last * k.COLUMNS, len(rows))
        _fill_words(state, _U32(counter + low), rows[low:high])

    parallel_for(-(-len(rows) // k.COLUMNS), fill)
