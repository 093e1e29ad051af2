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
    ``e^(z - peak) z`` (the latter with ENTROPY). The row's targets in the block are picked.
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
        total = total * shrink + tl.sum(p, 0)
        if ENTROPY:
            moment = moment * shrink + tl.sum(tl.where(p > 0, p * z, 0.0), 0)
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
