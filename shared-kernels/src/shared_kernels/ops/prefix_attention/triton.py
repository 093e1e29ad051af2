"""Attention over a shared prefix in Triton: one program per key head and tile of queries.

A tile holds the queries of up to 128 (token, head of the group) pairs of consecutive rows that see
the same ranges. It walks each range from its start in blocks of fixed size, and then the own keys
row by row, so what a row computes does not depend on the rows beside it. ``WIDEN`` turns 16-bit
operands into float32 before a dot, which the interpreter needs.
"""

import triton
import triton.language as tl

from shared_kernels.ops.prefix_attention import layout
from shared_kernels.ops.triton_math import tanh

_QUERY = tl.constexpr(layout.QUERY)
_QUERIES = tl.constexpr(layout.QUERIES)
_OWN = tl.constexpr(layout.OWN)
_KEYS = tl.constexpr(layout.KEYS)
_SHARED = tl.constexpr(layout.SHARED)
_PREFIX = tl.constexpr(layout.PREFIX)
_ANCESTORS = tl.constexpr(layout.ANCESTORS)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc,
    total,
    peak,
    q,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    start,
    index,
    bound,
    visible,
    ahead,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    MASK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Take one block of keys, ``start + index``, into the running softmax.

    A query sees the keys whose index is below ``visible`` and, with a window, less than that
    behind ``ahead``, its place in front of the range's first key; without MASK it sees them all.
    """
    dims = tl.arange(0, BD)
    columns = tl.arange(0, BDV)
    place = (start + index).to(tl.int64)
    k_place = k_ptr + place[None, :] * k_row + dims[:, None]
    v_place = v_ptr + place[:, None] * v_row + columns[None, :]
    if MASK:
        inside = index < bound
        k = tl.load(k_place, mask=inside[None, :] & (dims < D)[:, None], other=0.0)
        v = tl.load(v_place, mask=inside[:, None] & (columns < DV)[None, :], other=0.0)
    else:
        k = _load(k_place, (dims < D)[:, None], D == BD)
        v = _load(v_place, (columns < DV)[None, :], DV == BDV)
    if WIDEN:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    z = tl.dot(q, k, input_precision="ieee")
    factor = scale
    if SOFTCAP:
        z = tanh(z * scale)
        factor = softcap
    if MASK:
        seen = index[None, :] < visible[:, None]
        if WINDOW:
            seen = seen & (ahead[:, None] - index[None, :] < window)
        z = tl.where(seen, z, float("-inf"))
    higher = tl.maximum(peak, tl.max(z, 1) * factor)
    safe = higher
    if MASK:
        safe = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(z * factor - safe[:, None])
    shrink = tl.exp2(peak - safe)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, higher


@triton.jit
def _load(place, mask, ALL: tl.constexpr):
    if ALL:
        return tl.load(place)
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def _field(rows_ptr, row, column, live, COLUMNS: tl.constexpr):
    return tl.load(rows_ptr + row.to(tl.int64) * COLUMNS + column, mask=live, other=0)


@triton.jit(do_not_specialize=["scale", "softcap", "window"])
def prefix_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    shared_k_ptr,
    shared_v_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    rows_ptr,
    token_rows_ptr,
    tiles_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    shared_k_row,
    shared_k_head,
    shared_v_row,
    shared_v_head,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    OWN_BN: tl.constexpr,
    DEPTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend from one tile of queries. ``scale`` and ``softcap`` are for base-2 exponentials."""
    COLUMNS: tl.constexpr = _ANCESTORS + 2 * DEPTH
    head = tl.program_id(1)
    first = tl.load(tiles_ptr + tl.program_id(0) * 2)
    end = tl.load(tiles_ptr + tl.program_id(0) * 2 + 1)
    row0 = tl.load(token_rows_ptr + first)
    row1 = tl.load(token_rows_ptr + end - 1)

    lane = tl.arange(0, BM)
    token = first + lane // GROUP
    query_head = head * GROUP + lane % GROUP
    live = token < end
    row = tl.load(token_rows_ptr + token, mask=live, other=0)
    dims = tl.arange(0, BD)
    q = tl.load(
        q_ptr + token.to(tl.int64)[:, None] * q_row + query_head[:, None] * q_head + dims[None, :],
        mask=live[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    if WIDEN:
        q = q.to(tl.float32)
    acc = tl.zeros((BM, BDV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)

    own_visible = (
        _field(rows_ptr, row, _KEYS, live, COLUMNS)
        - _field(rows_ptr, row, _QUERIES, live, COLUMNS)
        + token
        - _field(rows_ptr, row, _QUERY, live, COLUMNS)
        + 1
    )
    before = _field(rows_ptr, row, _PREFIX, live, COLUMNS)
    for place in tl.static_range(DEPTH):
        before += _field(rows_ptr, row, _ANCESTORS + 2 * place + 1, live, COLUMNS)
    # how far a query stands in front of the first key of the range at hand
    ahead = before + own_visible - 1

    # the columns of the ancestors follow those of the shared range
    for place in tl.static_range(1 + DEPTH):
        if place == 0:
            k_base = shared_k_ptr + head * shared_k_head
            v_base = shared_v_ptr + head * shared_v_head
            k_step = shared_k_row
            v_step = shared_v_row
        else:
            k_base = k_ptr + head * k_head
            v_base = v_ptr + head * v_head
            k_step = k_row
            v_step = v_row
        start = tl.load(rows_ptr + row0.to(tl.int64) * COLUMNS + _SHARED + 2 * place)
        visible = _field(rows_ptr, row, _PREFIX + 2 * place, live, COLUMNS)
        bound = tl.max(visible)
        low = 0
        full = tl.min(tl.where(live, visible, 0x7FFFFFFF)) // BN * BN
        if WINDOW:
            nearest = tl.min(tl.where(live, ahead, 0x7FFFFFFF))
            low = tl.maximum(nearest - window + 1, 0) // BN * BN
            full = low
        for n in range(low, full, BN):
            acc, total, peak = _attend(
                acc, total, peak, q, k_base, v_base, k_step, v_step, start,
                n + tl.arange(0, BN), bound, visible, ahead, scale, softcap, window,
                D, DV, BD, BDV, False, WINDOW, SOFTCAP, WIDEN,
            )  # fmt: skip
        for n in range(full, bound, BN):
            acc, total, peak = _attend(
                acc, total, peak, q, k_base, v_base, k_step, v_step, start,
                n + tl.arange(0, BN), bound, visible, ahead, scale, softcap, window,
                D, DV, BD, BDV, True, WINDOW, SOFTCAP, WIDEN,
            )  # fmt: skip
        ahead -= visible

    for other in range(row0, row1 + 1):
        fields = rows_ptr + tl.cast(other, tl.int64) * COLUMNS
        begin = tl.load(fields + _QUERY)
        queries = tl.load(fields + _QUERIES)
        start = tl.load(fields + _OWN)
        bound = tl.load(fields + _KEYS) - queries + tl.minimum(end - begin, queries)
        visible = tl.where(row == other, own_visible, 0)
        for n in range(0, bound, OWN_BN):
            acc, total, peak = _attend(
                acc, total, peak, q, k_ptr + head * k_head, v_ptr + head * v_head, k_row, v_row,
                start, n + tl.arange(0, OWN_BN), bound, visible, ahead, scale, softcap, window,
                D, DV, BD, BDV, True, WINDOW, SOFTCAP, WIDEN,
            )  # fmt: skip

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + query_head, mask=live, other=0.0).to(tl.float32) * _LOG2E
        higher = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.exp2(sink - higher)
        acc = acc * shrink[:, None]
        peak = higher
    heads = tl.num_programs(1) * GROUP
    slot = token.to(tl.int64) * heads + query_head
    columns = tl.arange(0, BDV)
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(
        out_ptr + slot[:, None] * DV + columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (columns < DV)[None, :],
    )
    lse = (peak + tl.log2(tl.where(empty, 1.0, total))) * _LN2
    tl.store(lse_ptr + slot, tl.where(empty, float("-inf"), lse), mask=live)


@triton.jit
def merge_kernel(
    outs,
    lses,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    count,
    heads,
    width,
    BLOCK: tl.constexpr,
    BDV: tl.constexpr,
):
    """Merge the states of ``BLOCK`` (token, head) pairs."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BDV)
    inside = pair < count
    mask = inside[:, None] & (columns < width)[None, :]
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    for lse in tl.static_range(len(lses)):
        part = tl.load(lses[lse] + pair, mask=inside, other=float("-inf"))
        peak = tl.maximum(peak, part)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + pair % heads, mask=inside, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, sink)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros((BLOCK,), tl.float32)
    if sinks_ptr is not None:
        total += tl.exp(sink - safe)
    acc = tl.zeros((BLOCK, BDV), tl.float32)
    offset = pair.to(tl.int64)[:, None] * width + columns[None, :]
    for state in tl.static_range(len(lses)):
        part = tl.load(lses[state] + pair, mask=inside, other=float("-inf"))
        weight = tl.exp(part - safe)
        total += weight
        value = tl.load(outs[state] + offset, mask=mask, other=0.0).to(tl.float32)
        # a set without keys counts nothing, whatever its output holds
        acc += tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * value)
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)
    merged = safe + tl.log(tl.where(empty, 1.0, total))
    tl.store(lse_ptr + pair, tl.where(empty, float("-inf"), merged), mask=inside)
