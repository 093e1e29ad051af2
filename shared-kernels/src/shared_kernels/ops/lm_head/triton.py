"""One pass over a block of logits in Triton."""

import triton
import triton.language as tl

from shared_kernels.ops.triton_math import tanh

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _finish(z, column, bias_ptr, mask, scale, softcap, SOFTCAP: tl.constexpr):
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    z *= scale
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit(do_not_specialize=["first", "width", "scale", "softcap"])
def logits_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    order_ptr,
    starts_ptr,
    target_ptr,
    peak_ptr,
    argmax_ptr,
    total_ptr,
    moment_ptr,
    row0,
    stride,
    first,
    width,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the products of one row with the head's rows ``first .. first + width`` into its state.

    The state of a row is the largest logit, its place, and the sums of ``e^(z - peak)`` and of
    ``e^(z - peak) (z - peak)`` (the latter with ENTROPY). The row's targets in the block are
    picked.
    """
    row = tl.program_id(0).to(tl.int64)
    state = row0 + row
    peak = tl.load(peak_ptr + state)
    argmax = tl.load(argmax_ptr + state)
    total = tl.load(total_ptr + state)
    moment = tl.load(moment_ptr + state)
    logits_ptr += row * stride
    for low in range(0, width, BLOCK):
        column = low + tl.arange(0, BLOCK)
        mask = column < width
        z = tl.load(logits_ptr + column, mask=mask, other=0.0)
        z = _finish(z, first + column, bias_ptr, mask, scale, softcap, SOFTCAP)
        z = tl.where(mask, z, float("-inf"))
        best = tl.max(z, 0)
        place = tl.min(tl.where(z == best, column, 0x7FFFFFFF), 0)
        argmax = tl.where(best > peak, (first + place).to(tl.int64), argmax)
        higher = tl.maximum(peak, best)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2((z - safe) * _LOG2E)
        shrink = tl.exp2((peak - safe) * _LOG2E)
        if ENTROPY:
            shift = tl.where(peak == float("-inf"), 0.0, peak - safe)
            moment = (moment + shift * total) * shrink
            moment += tl.sum(tl.where(p > 0, p * (z - safe), 0.0), 0)
        total = total * shrink + tl.sum(p, 0)
        peak = higher
    tl.store(peak_ptr + state, peak)
    tl.store(argmax_ptr + state, argmax)
    tl.store(total_ptr + state, total)
    tl.store(moment_ptr + state, moment)
    for place in range(tl.load(starts_ptr + state), tl.load(starts_ptr + state + 1)):
        target = tl.load(order_ptr + place)
        column = (tl.load(targets_ptr + target) - first).to(tl.int32)
        inside = (column >= 0) & (column < width)
        z = tl.load(logits_ptr + column, mask=inside, other=0.0)
        z = _finish(z, first + column, bias_ptr, inside, scale, softcap, SOFTCAP)
        tl.store(target_ptr + target, z, mask=inside)


@triton.jit(do_not_specialize=["count", "vocabulary", "tiles", "scale", "softcap"])
def entropy_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    count,
    vocabulary,
    width,
    tiles,
    hidden_stride,
    weight_stride,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Multiply M rows with ``tiles`` tiles of N rows of the head, and keep their sums only.

    Program (i, j) takes the j-th part of the head; its (peak, total, moment) of each row goes to
    ``state (splits, 3, count)``. EVEN: the width is a multiple of K.
    """
    row = tl.program_id(0) * M + tl.arange(0, M)
    split = tl.program_id(1)
    here = row < count
    k = tl.arange(0, K)
    hidden_ptr += tl.where(here, row, 0).to(tl.int64)[:, None] * hidden_stride + k[None, :]
    peak = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    moment = tl.zeros((M,), tl.float32)
    for tile in range(split * tiles, (split + 1) * tiles):
        token = tile * N + tl.arange(0, N)
        known = token < vocabulary
        places = tl.where(known, token, 0).to(tl.int64)[None, :] * weight_stride + k[:, None]
        z = tl.zeros((M, N), tl.float32)
        for low in range(0, width, K):
            if EVEN:
                a = tl.load(hidden_ptr + low)
                b = tl.load(weight_ptr + places + low)
            else:
                inside = low + k < width
                a = tl.load(hidden_ptr + low, mask=inside[None, :], other=0.0)
                b = tl.load(weight_ptr + places + low, mask=inside[:, None], other=0.0)
            z = tl.dot(a, b, z, input_precision="ieee")
        z = _finish(z, token[None, :], bias_ptr, known[None, :], scale, softcap, SOFTCAP)
        z = tl.where(known[None, :], z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        z -= safe[:, None]
        p = tl.exp2(z * _LOG2E)
        shift = tl.where(peak == float("-inf"), 0.0, peak - safe)
        shrink = tl.exp2((peak - safe) * _LOG2E)
        moment = (moment + shift * total) * shrink + tl.sum(tl.where(p > 0, p * z, 0.0), 1)
        total = total * shrink + tl.sum(p, 1)
        peak = higher
    state_ptr += split.to(tl.int64) * 3 * count + row
    tl.store(state_ptr, peak, mask=here)
    tl.store(state_ptr + count, total, mask=here)
    tl.store(state_ptr + 2 * count, moment, mask=here)
