"""Zeroth-order materialisation in Triton: one pass over a tile, noise regenerated in registers."""

import triton
import triton.language as tl

from shared_kernels.random.triton import dither_groups, draw_groups


@triton.jit
def _load(master_ptr, lo_ptr, offset):
    # upcast right after the load: 16-bit arithmetic is wrong in the interpreter and slow elsewhere
    y = tl.load(master_ptr + offset).to(tl.float32)
    if lo_ptr is not None:
        bits = y.to(tl.int32, bitcast=True) + tl.load(lo_ptr + offset).to(tl.int32)
        y = bits.to(tl.float32, bitcast=True)
    return y


@triton.jit
def _emit(out_ptr, offset, value):
    tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty))


@triton.jit
def _fold(master_ptr, lo_ptr, offset, mask, y, dither, STOCHASTIC: tl.constexpr):
    if lo_ptr is not None:
        bits = y.to(tl.uint32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
        high = (bits + 0x8000) >> 16
        low = (bits - (high << 16)).to(tl.int32, bitcast=True).to(tl.int16)
        tl.store(master_ptr + offset, high.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(lo_ptr + offset, low, mask=mask)
    elif STOCHASTIC:
        bits = y.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        truncated = bits >> 16
        special = tl.where(magnitude > 0x7F800000, truncated | 0x40, truncated)
        rounded = tl.where(magnitude >= 0x7F800000, special, (bits + dither) >> 16)
        value = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(master_ptr + offset, value, mask=mask)
    else:
        tl.store(master_ptr + offset, y.to(master_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "records",
        "seed_low",
        "seed_high",
        "direction",
        "eps",
        "dither_low",
        "dither_high",
    ],
    # Rows of a table start at any address; each alignment would be a compilation in mid-run.
    do_not_specialize_on_alignment=["tiles_ptr", "keys_ptr", "coefs_ptr"],
)
def zo_kernel(
    master_ptr,
    lo_ptr,
    tiles_ptr,
    keys_ptr,
    coefs_ptr,
    plus_ptr,
    minus_ptr,
    records,
    seed_low,
    seed_high,
    direction,
    eps,
    dither_low,
    dither_high,
    GAUSSIAN: tl.constexpr,
    PERTURB: tl.constexpr,
    FOLD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Replay, perturb and fold ``GROUPS`` groups (1024 elements each) of one tile per program.

    ``lo_ptr``, ``plus_ptr`` and ``minus_ptr`` may be None. A tile is whole in memory, so loads and
    output stores need no mask, which would stop them from being 16 bytes wide; only the last tile
    of a segment has padding, and takes the masked branches.
    """
    index = tl.arange(0, 32 * GROUPS)[:, None]
    j = tl.arange(0, 8)[None, :]
    pid = tl.program_id(0)
    tile = (pid // (4 // GROUPS)).to(tl.int64)
    group0 = (pid % (4 // GROUPS)) * GROUPS

    row = tiles_ptr + tile * 5
    uid = tl.load(row).to(tl.uint32, bitcast=True)
    start_low = tl.load(row + 1).to(tl.uint32, bitcast=True)
    start_high = tl.load(row + 2).to(tl.uint32, bitcast=True)
    valid = tl.load(row + 3)
    decays = (tl.load(row + 4) & 1) != 0

    inside = (group0 + index // 32) * 1024 + (index % 32) * 8 + j
    offset = tile * 4096 + inside
    y0 = _load(master_ptr, lo_ptr, offset)
    y1 = _load(master_ptr, lo_ptr, offset + 256)
    y2 = _load(master_ptr, lo_ptr, offset + 512)
    y3 = _load(master_ptr, lo_ptr, offset + 768)

    for record in range(records):
        key = keys_ptr + record * 3
        k0 = tl.load(key).to(tl.uint32, bitcast=True)
        k1 = tl.load(key + 1).to(tl.uint32, bitcast=True)
        probe = tl.load(key + 2).to(tl.uint32, bitcast=True)
        coef = coefs_ptr + record * 2
        a = tl.where(decays, tl.load(coef), 1.0)
        b = tl.load(coef + 1)
        z0, z1, z2, z3 = draw_groups(
            index, j, group0, uid, start_low, start_high, probe, k0, k1, GAUSSIAN, WIDE
        )
        y0 = a * y0 - b * z0
        y1 = a * y1 - b * z1
        y2 = a * y2 - b * z2
        y3 = a * y3 - b * z3

    if FOLD:
        d0, d1, d2, d3 = y0, y1, y2, y3
        if STOCHASTIC:
            k0 = dither_low.to(tl.uint32, bitcast=True)
            k1 = dither_high.to(tl.uint32, bitcast=True)
            d0, d1, d2, d3 = dither_groups(
                index, j, group0, uid, start_low, start_high, k0, k1, WIDE
            )
        if valid == 4096:
            _fold(master_ptr, lo_ptr, offset, None, y0, d0, STOCHASTIC)
            _fold(master_ptr, lo_ptr, offset + 256, None, y1, d1, STOCHASTIC)
            _fold(master_ptr, lo_ptr, offset + 512, None, y2, d2, STOCHASTIC)
            _fold(master_ptr, lo_ptr, offset + 768, None, y3, d3, STOCHASTIC)
        else:
            _fold(master_ptr, lo_ptr, offset, inside < valid, y0, d0, STOCHASTIC)
            _fold(master_ptr, lo_ptr, offset + 256, inside + 256 < valid, y1, d1, STOCHASTIC)
            _fold(master_ptr, lo_ptr, offset + 512, inside + 512 < valid, y2, d2, STOCHASTIC)
            _fold(master_ptr, lo_ptr, offset + 768, inside + 768 < valid, y3, d3, STOCHASTIC)

    if plus_ptr is not None or minus_ptr is not None:
        if valid != 4096:
            y0 = tl.where(inside < valid, y0, 0.0)
            y1 = tl.where(inside + 256 < valid, y1, 0.0)
            y2 = tl.where(inside + 512 < valid, y2, 0.0)
            y3 = tl.where(inside + 768 < valid, y3, 0.0)
        if PERTURB:
            z0, z1, z2, z3 = draw_groups(
                index,
                j,
                group0,
                uid,
                start_low,
                start_high,
                direction.to(tl.uint32, bitcast=True),
                seed_low.to(tl.uint32, bitcast=True),
                seed_high.to(tl.uint32, bitcast=True),
                GAUSSIAN,
                WIDE,
            )
            if valid != 4096:
                z0 = tl.where(inside < valid, z0, 0.0)
                z1 = tl.where(inside + 256 < valid, z1, 0.0)
                z2 = tl.where(inside + 512 < valid, z2, 0.0)
                z3 = tl.where(inside + 768 < valid, z3, 0.0)
            t0 = eps * z0
            t1 = eps * z1
            t2 = eps * z2
            t3 = eps * z3
            if plus_ptr is not None:
                _emit(plus_ptr, offset, y0 + t0)
                _emit(plus_ptr, offset + 256, y1 + t1)
                _emit(plus_ptr, offset + 512, y2 + t2)
                _emit(plus_ptr, offset + 768, y3 + t3)
            if minus_ptr is not None:
                _emit(minus_ptr, offset, y0 - t0)
                _emit(minus_ptr, offset + 256, y1 - t1)
                _emit(minus_ptr, offset + 512, y2 - t2)
                _emit(minus_ptr, offset + 768, y3 - t3)
        else:
            _emit(plus_ptr, offset, y0)
            _emit(plus_ptr, offset + 256, y1)
            _emit(plus_ptr, offset + 512, y2)
            _emit(plus_ptr, offset + 768, y3)
