"""Zeroth-order materialisation on the CPU: numba, bit-equal to the reference.

One compiled function serves every combination: dtypes are numbers tested once per tile, and the
inner loops, over one tile in the first-level cache, are branch-free and become SIMD.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from shared_kernels._parallel import parallel_for
from shared_kernels.random.cpu import (
    bits_float,
    dither_tile,
    draw_tile,
    float_bits,
    helper,
)

_NONE, _FP32, _BF16, _FP16, _BF16X2 = range(5)
_KINDS = {torch.float32: _FP32, torch.bfloat16: _BF16, torch.float16: _FP16}
_U32, _U64 = np.uint32, np.uint64
_S32 = _U64(32)
_MASK = _U64(0xFFFFFFFF)
_ABS, _INF, _NAN = _U32(0x7FFFFFFF), _U32(0x7F800000), _U32(0x7FC00000)
_QUIET, _HALF_LSB, _ROUND, _LSB, _16 = _U32(0x40), _U32(0x7FFF), _U32(0x8000), _U32(1), _U32(16)
_ONE, _MINUS_ZERO = np.float32(1.0), np.float32(-0.0)


@intrinsic
def half_bits(typingctx, x):
    """Bit pattern of a float32 rounded to nearest even in float16, as uint16."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@helper
def _bits(x):
    return _U32(float_bits(x))


@helper
def _round_bf16(bits, increment):
    """Add ``increment`` below the 16 bits kept; infinities stay, NaN stays a quiet NaN."""
    magnitude = _U32(bits & _ABS)
    high = _U32(bits >> _16)
    special = _U32(high | _QUIET) if magnitude > _INF else high
    rounded = _U32(_U32(bits + increment) >> _16)
    return np.uint16(special if magnitude >= _INF else rounded)


@helper
def _nearest_bf16(x):
    bits = _bits(x)
    return _round_bf16(bits, _U32(_HALF_LSB + (_U32(bits >> _16) & _LSB)))


@helper
def _load(kind, m32, m16, lo, y):
    if kind == _FP32:
        for j in range(4096):
            y[j] = m32[j]
    elif kind == _BF16:
        for j in range(4096):
            y[j] = bits_float(np.int32(_U32(m16[j]) << _16))
    else:
        for j in range(4096):
            y[j] = bits_float(np.int32(np.int32(_U32(m16[j]) << _16) + np.int32(lo[j])))


@helper
def _replay(y, z, a, b, decays):
    if decays:
        for j in range(4096):
            y[j] = a * y[j] - b * z[j]
    else:
        for j in range(4096):
            y[j] = y[j] - b * z[j]


@helper
def _emit(kind, out32, out16, y, z, eps, valid):
    if kind == _FP32:
        for j in range(4096):
            out32[j] = y[j] + eps * z[j]
        out32[valid:] = 0
    elif kind == _BF16:
        for j in range(4096):
            out16[j] = _nearest_bf16(y[j] + eps * z[j])
        out16[valid:] = 0
    else:
        for j in range(4096):
            out16[j] = half_bits(y[j] + eps * z[j])
        out16[valid:] = 0


@helper
def _store(kind, stochastic, m32, m16, lo, y, dither, valid):
    if kind == _FP32:
        for j in range(valid):
            m32[j] = y[j]
    elif kind == _BF16X2:
        for j in range(valid):
            bits = _bits(y[j])
            bits = _NAN if _U32(bits & _ABS) > _INF else bits
            high = _U32(_U32(bits + _ROUND) >> _16)
            m16[j] = np.uint16(high)
            lo[j] = np.int16(_U32(bits - _U32(high << _16)))
    elif stochastic:
        for j in range(valid):
            m16[j] = _round_bf16(_bits(y[j]), _U32(dither[j]))
    else:
        for j in range(valid):
            m16[j] = _nearest_bf16(y[j])


_F32_ARRAY, _U16_ARRAY = "float32[::1]", "uint16[::1]"
_SIGNATURE = ", ".join(
    [
        "void(int64, int64, int32[:, ::1], int32[:, ::1], float32[:, ::1], boolean",
        *("int64", _F32_ARRAY, _U16_ARRAY, "int16[::1]"),
        *("int64", _F32_ARRAY, _U16_ARRAY) * 2,
        "boolean, uint64, uint64, float32",
        "boolean, boolean, uint64)",
    ]
)


@njit(_SIGNATURE, nogil=True, cache=True, error_model="numpy")
def _run(
    first,
    last,
    tiles,
    keys,
    coefs,
    gaussian,
    kind,
    m32,
    m16,
    lo,
    plus_kind,
    plus32,
    plus16,
    minus_kind,
    minus32,
    minus16,
    perturb,
    seed,
    direction,
    eps,
    fold,
    stochastic,
    dither_seed,
):
    words = np.empty(1024, np.uint32)
    y = np.empty(4096, np.float32)
    z = np.empty(4096, np.float32)
    dither = np.empty(4096, np.uint16)
    for tile in range(first, last):
        low = tile * 4096
        high = low + 4096
        uid = _U64(_U32(tiles[tile, 0]))
        start = _U64(_U32(tiles[tile, 1])) | (_U64(_U32(tiles[tile, 2])) << _S32)
        valid = np.int64(tiles[tile, 3])
        decays = (tiles[tile, 4] & 1) != 0
        m32_tile, m16_tile, lo_tile = m32[low:high], m16[low:high], lo[low:high]
        _load(kind, m32_tile, m16_tile, lo_tile, y)
        for record in range(keys.shape[0]):
            key = _U64(_U32(keys[record, 0])) | (_U64(_U32(keys[record, 1])) << _S32)
            draw_tile(gaussian, start, uid, _U64(_U32(keys[record, 2])), key, words, z)
            _replay(y, z, coefs[record, 0], coefs[record, 1], decays)
        if perturb:
            draw_tile(gaussian, start, uid, direction, seed, words, z)
        elif plus_kind != _NONE:
            # y + 1 * -0 is y, whatever the sign of a zero y
            z[:] = _MINUS_ZERO
        if plus_kind != _NONE:
            _emit(plus_kind, plus32[low:high], plus16[low:high], y, z, eps, valid)
        if minus_kind != _NONE:
            _emit(minus_kind, minus32[low:high], minus16[low:high], y, z, -eps, valid)
        if fold:
            if stochastic:
                k0, k1 = dither_seed & _MASK, dither_seed >> _S32
                dither_tile(start, uid, k0, k1, words, dither)
            _store(kind, stochastic, m32_tile, m16_tile, lo_tile, y, dither, valid)


_NO_F32, _NO_U16, _NO_I16 = (np.empty(0, dtype) for dtype in (np.float32, np.uint16, np.int16))


def _arrays(tensor: Tensor | None) -> tuple[int, np.ndarray, np.ndarray]:
    if tensor is None:
        return _NONE, _NO_F32, _NO_U16
    if tensor.dtype == torch.float32:
        return _FP32, tensor.numpy(), _NO_U16
    return _KINDS[tensor.dtype], _NO_F32, tensor.view(torch.int16).numpy().view(np.uint16)


def zo_materialize(
    master: Tensor,
    lo: Tensor | None,
    tiles: Tensor,
    keys: Tensor,
    coefs: Tensor,
    plus: Tensor | None,
    minus: Tensor | None,
    perturb: bool,
    seed: int,
    direction: int,
    eps: float,
    fold: bool,
    stochastic: bool,
    dither_seed: int,
    dist: str,
) -> None:
    """Replay, perturb and fold in place; arguments are those of the op (see `op.py`)."""
    kind, m32, m16 = _arrays(master)
    table = tiles.numpy()
    arguments = (
        table,
        keys.numpy(),
        coefs.numpy(),
        dist == "gaussian",
        kind if lo is None else _BF16X2,
        m32,
        m16,
        _NO_I16 if lo is None else lo.numpy(),
        *_arrays(plus),
        *_arrays(minus),
        perturb,
        _U64(seed & 0xFFFFFFFFFFFFFFFF),
        _U64(direction),
        np.float32(eps) if perturb else _ONE,
        fold,
        stochastic,
        _U64(dither_seed & 0xFFFFFFFFFFFFFFFF),
    )
    parallel_for(len(table), lambda first, last: _run(first, last, *arguments))
