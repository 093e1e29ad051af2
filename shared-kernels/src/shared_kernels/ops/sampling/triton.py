"""Kernels: sampling by Gumbel-max in parts of the vocabulary, and the refill of free slots."""

import triton
import triton.language as tl

from shared_kernels.ops.sampling import fields as f
from shared_kernels.random import constants as k
from shared_kernels.random.triton import gumbel, philox4x32

_DOMAIN = tl.constexpr(k.DOMAIN_TOKEN << k.DOMAIN_SHIFT)
_ROW, _TOKEN, _LENGTH, _POSITION = (tl.constexpr(x) for x in (f.ROW, f.TOKEN, f.LENGTH, f.POSITION))
_PREFIX, _START, _PREFIX_LENGTH = (tl.constexpr(x) for x in (f.PREFIX, f.START, f.PREFIX_LENGTH))
_KEY_LOW, _KEY_HIGH = (tl.constexpr(x) for x in (f.KEY_LOW, f.KEY_HIGH))
_COUNT, _LIMIT, _REASON = (tl.constexpr(x) for x in (f.COUNT, f.LIMIT, f.REASON))
_R_PREFIX, _R_START = (tl.constexpr(x) for x in (f.ROW_PREFIX, f.ROW_START))
_R_PREFIX_LENGTH = tl.constexpr(f.ROW_PREFIX_LENGTH)
_R_KEY_LOW, _R_KEY_HIGH = (tl.constexpr(x) for x in (f.ROW_KEY_LOW, f.ROW_KEY_HIGH))
_HEAD, _TAIL, _FINISHED = (tl.constexpr(x) for x in (f.HEAD, f.TAIL, f.FINISHED))
_STEPS, _BUSY, _CLOCK = (tl.constexpr(x) for x in (f.STEPS, f.BUSY, f.CLOCK))
_STOPPED, _CUT, _NOT_FINITE = (tl.constexpr(x) for x in (f.STOPPED, f.CUT, f.NOT_FINITE))


@triton.jit
def _take(value, place, best, best_place):
    """Return the larger value and its place; of equal ones the first."""
    better = (value > best) | ((value == best) & (place < best_place))
    return tl.where(better, value, best), tl.where(better, place, best_place)


@triton.jit(do_not_specialize=["vocab", "temperature"])
def sample_kernel(
    logits_ptr,
    keys_ptr,
    index_ptr,
    threshold_ptr,
    sums_ptr,
    best_ptr,
    vocab,
    row_stride,
    key_stride,
    word_stride,
    temperature,
    NOISE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Score a part of one row: its best token, and sums relative to its largest ``z``.

    ``sums (rows, parts, 5)`` get the best score, the largest z (NaN if one is not a number or
    infinite), ``sum e^(z - peak)``, ``sum e^(z - peak) (z - peak)``, and the first again,
    over kept tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = tl.arange(0, 256)[None, :]
    lane = tl.arange(0, 4)[:, None]
    k0 = tl.load(keys_ptr + row * key_stride).to(tl.uint32)
    k1 = tl.load(keys_ptr + row * key_stride + word_stride).to(tl.uint32)
    index = tl.load(index_ptr + row).to(tl.uint32)
    zero = index * 0
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + row)
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), 2147483647, tl.int32)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    kept = tl.zeros((), tl.float32)
    bad = tl.zeros((), tl.int32)
    for segment in range(part * SEGMENTS, (part + 1) * SEGMENTS):
        token = segment * 1024 + lane * 256 + column
        inside = token < vocab
        z = tl.load(logits_ptr + row * row_stride + token, mask=inside, other=float("-inf"))
        z = z.to(tl.float32)
        if NOISE:
            z = tl.div_rn(z, zero.to(tl.float32) + temperature)
        bad += tl.sum(tl.sum(((z != z) | (z == float("inf"))).to(tl.int32), 1), 0)
        score = z
        if NOISE:
            block = (segment * 256 + column).to(tl.uint32)
            w0, w1, w2, w3 = philox4x32(block, index, zero, zero + _DOMAIN, k0, k1, False)
            low = tl.where(lane == 0, w0, w1)
            high = tl.where(lane == 2, w2, w3)
            score = z + gumbel(tl.where(lane < 2, low, high))
        keep = inside
        if threshold_ptr is not None:
            keep = keep & (z >= threshold)
        score = tl.where(keep, score, float("-inf"))
        high = tl.max(tl.max(score, 1), 0)
        place = tl.min(tl.min(tl.where(keep & (score == high), token, 2147483647), 1), 0)
        best, best_id = _take(high, place, best, best_id)
        new = tl.maximum(peak, tl.max(tl.max(z, 1), 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.where(peak == float("-inf"), 0.0, tl.exp(peak - safe))
        gap = tl.where(z == float("-inf"), 0.0, z - safe)
        weight = tl.where(z == float("-inf"), 0.0, tl.exp(z - safe))
        moved = tl.where(peak == float("-inf"), 0.0, peak - safe)
        weighted = shrink * (weighted + moved * total) + tl.sum(tl.sum(weight * gap, 1), 0)
        total = total * shrink + tl.sum(tl.sum(weight, 1), 0)
        kept = kept * shrink + tl.sum(tl.sum(tl.where(keep, weight, 0.0), 1), 0)
        peak = new
    place = row * tl.num_programs(1) + part
    out = sums_ptr + place * 5
    tl.store(out, best)
    tl.store(out + 1, tl.where(bad > 0, float("nan"), peak))
    tl.store(out + 2, total)
    tl.store(out + 3, weighted)
    tl.store(out + 4, kept)
    tl.store(best_ptr + place, best_id)


@triton.jit(do_not_specialize=["vocab", "temperature"])
def sample_merge_kernel(
    logits_ptr,
    sums_ptr,
    best_ptr,
    threshold_ptr,
    token_ptr,
    logprob_ptr,
    kept_ptr,
    entropy_ptr,
    vocab,
    parts,
    row_stride,
    temperature,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the parts of one row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    inside = part < parts
    place = row * parts + part
    score = tl.load(sums_ptr + place * 5, mask=inside, other=float("-inf"))
    peak = tl.load(sums_ptr + place * 5 + 1, mask=inside, other=float("-inf"))
    total = tl.load(sums_ptr + place * 5 + 2, mask=inside, other=0.0)
    weighted = tl.load(sums_ptr + place * 5 + 3, mask=inside, other=0.0)
    kept = tl.load(sums_ptr + place * 5 + 4, mask=inside, other=0.0)
    token = tl.load(best_ptr + place, mask=inside, other=2147483647)
    bad = tl.sum((peak != peak).to(tl.int32), 0) > 0
    top = tl.max(tl.where(peak != peak, float("-inf"), peak), 0)
    bad = bad | (top == float("-inf"))
    safe = tl.where(bad, 0.0, top)
    moved = tl.where(peak == float("-inf"), 0.0, peak - safe)
    shrink = tl.where(peak == float("-inf"), 0.0, tl.exp(moved))
    weighted = tl.sum(shrink * (weighted + moved * total), 0)
    kept = tl.sum(kept * shrink, 0)
    total = tl.sum(total * shrink, 0)
    best = tl.max(score, 0)
    token = tl.min(tl.where(score == best, token, 2147483647), 0)
    bad = bad | (token >= vocab)
    z = tl.load(logits_ptr + row * row_stride + tl.where(bad, 0, token)).to(tl.float32)
    if NOISE:
        z = tl.div_rn(z, total * 0.0 + temperature)
    nan = float("nan")
    tl.store(token_ptr + row, tl.where(bad, -1, token).to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(bad, nan, z - safe - tl.log(total)))
    tl.store(entropy_ptr + row, tl.where(bad, nan, tl.log(total) - weighted / total))
    if threshold_ptr is not None:
        tl.store(kept_ptr + row, tl.where(bad, nan, tl.log(kept) - tl.log(total)))
    else:
        tl.store(kept_ptr + row, 0.0)


@triton.jit(do_not_specialize=["lanes", "rows", "limit", "stops", "places", "tile"])
def refill_kernel(
    slots_ptr,
    rows_ptr,
    queue_ptr,
    counters_ptr,
    order_ptr,
    tiles_ptr,
    tokens_ptr,
    logprobs_ptr,
    token_ptr,
    logprob_ptr,
    eos_ptr,
    lanes,
    rows,
    limit,
    stops,
    places,
    tile,
    RECORD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOT_FIELDS: tl.constexpr,
):
    """Do one refill; ``rows`` is the width of the table and ``limit`` that of the outputs."""
    lane = tl.arange(0, BLOCK)
    here = lane < lanes
    lanes64 = tl.cast(lanes, tl.int64)
    rows64 = tl.cast(rows, tl.int64)
    row = tl.load(slots_ptr + _ROW * lanes64 + lane, mask=here, other=-1)
    active = row >= 0
    ended = active & False
    if RECORD:
        token = tl.load(token_ptr + lane, mask=here, other=0)
        logprob = tl.load(logprob_ptr + lane, mask=here, other=0.0)
        count = tl.load(rows_ptr + _COUNT * rows64 + row, mask=active, other=0)
        most = tl.load(rows_ptr + _LIMIT * rows64 + row, mask=active, other=0)
        good = active & (token >= 0)
        place = row * limit + count
        tl.store(tokens_ptr + place, token.to(tokens_ptr.dtype.element_ty), mask=good)
        tl.store(logprobs_ptr + place, logprob.to(logprobs_ptr.dtype.element_ty), mask=good)
        count += good.to(tl.int64)
        reason = tl.where(count >= most, _CUT, 0)
        for stop in range(stops):
            reason = tl.where(token == tl.load(eos_ptr + stop), _STOPPED, reason)
        reason = tl.where(token < 0, _NOT_FINITE, reason)
        tl.store(rows_ptr + _COUNT * rows64 + row, count, mask=active)
        tl.store(rows_ptr + _REASON * rows64 + row, reason.to(tl.int64), mask=active)
        ended = active & (reason > 0)
        busy = tl.sum(active.to(tl.int64), 0)
        done = tl.sum(ended.to(tl.int64), 0)
        tl.store(counters_ptr + _FINISHED, tl.load(counters_ptr + _FINISHED) + done)
        clock = tl.load(counters_ptr + _CLOCK) + 1
        steps = tl.load(counters_ptr + _STEPS)
        tl.store(counters_ptr + _CLOCK, clock)
        tl.store(counters_ptr + _STEPS, tl.where(busy > 0, clock, steps))
        tl.store(counters_ptr + _BUSY, tl.load(counters_ptr + _BUSY) + busy)
    free = here & ((row < 0) | ended) & (lane < places)
    head = tl.load(counters_ptr + _HEAD)
    tail = tl.load(counters_ptr + _TAIL)
    place = head + tl.cumsum(free.to(tl.int64), 0) - free.to(tl.int64)
    taken = free & (place < tail)
    waiting = tl.load(queue_ptr + place, mask=taken, other=-1)
    row = tl.where(taken, waiting, tl.where(ended, -1, row))
    # counts and tokens of this step were written by other threads
    tl.debug_barrier()
    tl.store(counters_ptr + _HEAD, head + tl.sum(taken.to(tl.int64), 0))

    active = here & (row >= 0)
    count = tl.load(rows_ptr + _COUNT * rows64 + row, mask=active, other=0)
    token = tl.load(tokens_ptr + row * limit + tl.maximum(count - 1, 0), mask=active, other=0)
    prefix = tl.load(rows_ptr + _R_PREFIX * rows64 + row, mask=active, other=-1)
    start = tl.load(rows_ptr + _R_START * rows64 + row, mask=active, other=0)
    length = tl.load(rows_ptr + _R_PREFIX_LENGTH * rows64 + row, mask=active, other=0)
    low = tl.load(rows_ptr + _R_KEY_LOW * rows64 + row, mask=active, other=0)
    high = tl.load(rows_ptr + _R_KEY_HIGH * rows64 + row, mask=active, other=0)
    position = tl.where(active, length + count - 1, 0)
    tl.store(slots_ptr + _ROW * lanes64 + lane, row, mask=here)
    tl.store(slots_ptr + _TOKEN * lanes64 + lane, token.to(tl.int64), mask=here)
    tl.store(slots_ptr + _LENGTH * lanes64 + lane, count, mask=here)
    tl.store(slots_ptr + _POSITION * lanes64 + lane, position, mask=here)
    tl.store(slots_ptr + _PREFIX * lanes64 + lane, prefix, mask=here)
    tl.store(slots_ptr + _START * lanes64 + lane, start, mask=here)
    tl.store(slots_ptr + _PREFIX_LENGTH * lanes64 + lane, length, mask=here)
    tl.store(slots_ptr + _KEY_LOW * lanes64 + lane, low, mask=here)
    tl.store(slots_ptr + _KEY_HIGH * lanes64 + lane, high, mask=here)
    tl.debug_barrier()

    # how many slots come before each, by prefix and then by number; idle ones last
    far = tl.full((), 9223372036854775807, tl.int64)
    mine = tl.where(active, prefix, far)
    rank = lane * 0
    inside = lane * 0
    size = lane * 0
    for begin in range(0, lanes, CHUNK):
        other = begin + tl.arange(0, CHUNK)
        theirs = tl.load(slots_ptr + _PREFIX * lanes64 + other, mask=other < lanes, other=-1)
        theirs = tl.where(theirs < 0, far, theirs)
        valid = (other < lanes)[None, :]
        same = valid & (theirs[None, :] == mine[:, None])
        before = same & (other[None, :] < lane[:, None])
        lower = valid & (theirs[None, :] < mine[:, None])
        rank += tl.sum((before | lower).to(tl.int32), 1)
        inside += tl.sum(before.to(tl.int32), 1)
        size += tl.sum(same.to(tl.int32), 1)
    tl.store(order_ptr + rank, lane.to(tl.int64), mask=here)
    # the first slots of tiles, brought into the order and numbered
    leads = active & (inside % tile == 0)
    counts = tiles_ptr + lanes + 1
    tl.store(tiles_ptr + rank, leads.to(tl.int64), mask=here)
    tl.store(counts + rank, tl.minimum(size - inside, tile).to(tl.int64), mask=here)
    tl.debug_barrier()
    lead = tl.load(tiles_ptr + lane, mask=here, other=0)
    count = tl.load(counts + lane, mask=here, other=0)
    tl.debug_barrier()
    number = tl.cumsum(lead, 0) - 1
    tl.store(tiles_ptr + lane, count * 0, mask=here)
    tl.store(counts + lane, count * 0, mask=here)
    tl.debug_barrier()
    tl.store(tiles_ptr + number, lane.to(tl.int64), mask=here & (lead > 0))
    tl.store(counts + number, count, mask=here & (lead > 0))
