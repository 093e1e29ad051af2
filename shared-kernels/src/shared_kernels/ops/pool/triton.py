"""Softmax-weighted sums in Triton."""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def segment_kernel(
    hidden_ptr,
    score_ptr,
    mask_ptr,
    bounds_ptr,
    state_ptr,
    sums_ptr,
    width,
    stride,
    count,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sum one part of one segment over COLS columns.

    Program (i, j, c) takes the j-th part of segment i. Peak and total of the part go to
    ``state (splits, 2, count)``, its weighted sum to ``sums (splits, count, width)``.
    """
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(1)
    column = tl.program_id(2) * COLS + tl.arange(0, COLS)
    inside = column < width
    begin = tl.load(bounds_ptr + segment)
    end = tl.load(bounds_ptr + segment + 1)
    step = tl.cdiv(tl.cdiv(end - begin, splits), ROWS) * ROWS
    low = begin + split * step
    high = tl.minimum(end, low + step)
    peak = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    weighted = tl.zeros((COLS,), tl.float32)
    for first in range(low, high, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        keep = row < high
        keep = keep & (tl.load(mask_ptr + row, mask=keep, other=0) != 0)
        score = tl.load(score_ptr + row, mask=keep, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(score, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2((score - safe) * _LOG2E)
        shrink = tl.exp2((peak - safe) * _LOG2E)
        h = tl.load(
            hidden_ptr + row[:, None] * stride + column[None, :],
            mask=keep[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        total = total * shrink + tl.sum(p, 0)
        weighted = weighted * shrink + tl.sum(p[:, None] * h, 0)
        peak = higher
    tl.store(sums_ptr + (split * count + segment) * width + column, weighted, mask=inside)
    if tl.program_id(2) == 0:
        tl.store(state_ptr + (2 * split) * count + segment + tl.arange(0, 1), peak)
        tl.store(state_ptr + (2 * split + 1) * count + segment + tl.arange(0, 1), total)


@triton.jit
def update_kernel(
    peak_ptr,
    total_ptr,
    weighted_ptr,
    hidden_ptr,
    score_ptr,
    numbers_ptr,
    active_ptr,
    features_ptr,
    width,
    numbers,
    hidden_stride,
    features_stride,
    COLS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Add a token to the sums of a row, and write ``[mean ; h ; numbers]``."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active_ptr + row) != 0:
        peak = tl.load(peak_ptr + row)
        total = tl.load(total_ptr + row)
        score = tl.load(score_ptr + row).to(tl.float32)
        higher = tl.maximum(peak, score)
        shrink = tl.exp2((peak - higher) * _LOG2E)
        weight = tl.exp2((score - higher) * _LOG2E)
        whole = total * shrink + weight
        features_ptr += row * features_stride
        for low in range(0, width, COLS):
            column = low + tl.arange(0, COLS)
            inside = column < width
            h = tl.load(hidden_ptr + row * hidden_stride + column, mask=inside, other=0.0)
            acc = tl.load(weighted_ptr + row * width + column, mask=inside, other=0.0)
            acc = acc * shrink + h.to(tl.float32) * weight
            tl.store(weighted_ptr + row * width + column, acc, mask=inside)
            tl.store(features_ptr + column, acc / whole, mask=inside)
            tl.store(features_ptr + width + column, h, mask=inside)
        place = tl.arange(0, NUMBERS)
        extra = tl.load(numbers_ptr + row * numbers + place, mask=place < numbers, other=0.0)
        tl.store(features_ptr + 2 * width + place, extra, mask=place < numbers)
        tl.store(peak_ptr + row, higher)
        tl.store(total_ptr + row, whole)


@triton.jit
def output_kernel(
    inner_ptr,
    gain_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    width,
    bins,
    stride,
    eps,
    COLS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Normalise a row, apply ReLU and the second layer, and take the softmax."""
    row = tl.program_id(0).to(tl.int64)
    inner_ptr += row * stride
    sums = tl.zeros((COLS,), tl.float32)
    for low in range(0, width, COLS):
        column = low + tl.arange(0, COLS)
        sums += tl.load(inner_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / width
    squares = tl.zeros((COLS,), tl.float32)
    for low in range(0, width, COLS):
        column = low + tl.arange(0, COLS)
        inside = column < width
        x = tl.load(inner_ptr + column, mask=inside, other=0.0).to(tl.float32) - mean
        squares += tl.where(inside, x * x, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / width + eps)
    place = tl.arange(0, BINS)
    known = place < bins
    z = tl.load(bias_ptr + place, mask=known, other=float("-inf")).to(tl.float32)
    for low in range(0, width, COLS):
        column = low + tl.arange(0, COLS)
        inside = column < width
        x = (tl.load(inner_ptr + column, mask=inside, other=0.0).to(tl.float32) - mean) * inverse
        x *= tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
        # not maximum(x, 0), which hides what is not a number
        x = tl.where(x < 0, 0.0, x)
        w = tl.load(
            weight_ptr + place[:, None] * width + column[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        z += tl.sum(w * x[None, :], 1)
    p = tl.exp2((z - tl.max(z, 0)) * _LOG2E)
    tl.store(out_ptr + row * bins + place, p / tl.sum(p, 0), mask=known)
