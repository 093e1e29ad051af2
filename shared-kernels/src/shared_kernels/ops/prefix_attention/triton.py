"""Attention over a shared prefix in Triton: one program per key head and tile of queries.

A tile holds the queries of up to 128 (token, head of the group) pairs of consecutive rows that see
the same ranges. It walks the shared keys that all of them see, and then the blocks that its table
lists: what remains of the ranges, and the own keys row by row, with the last keys of an ancestor in
front where they fit into the row's blocks. Blocks have one size, and where they begin is up to the
row alone, so what a row computes does not depend on the rows beside it. ``WIDEN`` turns 16-bit
operands into float32 before a dot, which the interpreter needs.
"""

import triton
import triton.language as tl

from shared_kernels.ops.triton_math import tanh

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc,
    total,
    peak,
    q,
    k,
    v,
    index,
    visible,
    ahead,
    scale,
    softcap,
    window,
    MASK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Take one block of keys ``k`` (D, BN) and values ``v`` (BN, DV) into the running softmax.

    A query sees the keys whose index is below ``visible`` and, with a window, less than that
    behind ``ahead``, its place in front of the first; without MASK it sees all.
    """
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


@triton.jit(do_not_specialize=["scale", "softcap", "window"])
def prefix_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    shared_k_ptr,
    shared_v_ptr,
    shared_k_blocks,
    shared_v_blocks,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    lanes_ptr,
    tiles_ptr,
    blocks_ptr,
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
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend from one tile of queries. ``scale`` and ``softcap`` are for base-2 exponentials.

    ``shared_k_blocks`` and ``shared_v_blocks`` describe the shared keys and values to the copy
    engine, in blocks of (BN, 1, BD); without them they are read through the pointers.
    """
    head = tl.program_id(1)
    tile = tiles_ptr + tl.program_id(0) * 7
    first = tl.load(tile)
    end = tl.load(tile + 1)
    start = tl.load(tile + 2)
    full = tl.load(tile + 3)
    block0 = tl.load(tile + 5)
    block1 = tl.load(tile + 6)

    lane = tl.arange(0, BM)
    token = first + lane // GROUP
    query_head = head * GROUP + lane % GROUP
    live = token < end
    lanes = lanes_ptr + token.to(tl.int64) * COLUMNS
    row = tl.load(lanes, mask=live, other=-2)
    dims = tl.arange(0, BD)
    columns = tl.arange(0, BDV)
    keys = tl.arange(0, BN)
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

    low = 0
    visible = 0
    ahead = 0
    if WINDOW:
        low = tl.maximum(tl.load(tile + 4) - window + 1, 0) // BN * BN
        visible = tl.load(lanes + 1, mask=live, other=0)
        ahead = tl.load(lanes + 2, mask=live, other=0)
    for n in range(low, full, BN):
        if shared_k_blocks is not None:
            k = shared_k_blocks.load([start + n, head, 0]).reshape(BN, BD).T
            v = shared_v_blocks.load([start + n, head, 0]).reshape(BN, BDV)
        else:
            place = (start + n + keys).to(tl.int64)
            k_base = shared_k_ptr + head * shared_k_head
            v_base = shared_v_ptr + head * shared_v_head
            k = tl.load(
                k_base + place[None, :] * shared_k_row + dims[:, None],
                mask=(dims < D)[:, None],
                other=0.0,
            )
            v = tl.load(
                v_base + place[:, None] * shared_v_row + columns[None, :],
                mask=(columns < DV)[None, :],
                other=0.0,
            )
        acc, total, peak = _attend(
            acc, total, peak, q, k, v, n + keys, visible, ahead, scale, softcap, window,
            WINDOW, WINDOW, SOFTCAP, WIDEN,
        )  # fmt: skip

    for n in range(block0, block1):
        block = blocks_ptr + tl.cast(n, tl.int64) * 8
        shared = tl.load(block) != 0
        place = tl.where(keys < tl.load(block + 6), tl.load(block + 7), tl.load(block + 1))
        place = place.to(tl.int64) + keys
        bound = tl.load(block + 2)
        column = tl.load(block + 3)
        offset = tl.load(block + 4)
        owner = tl.load(block + 5)
        below = tl.load(lanes + column, mask=live, other=0) - offset
        below = tl.where((owner == row) | (owner == -1), below, 0)
        behind = 0
        if WINDOW:
            behind = tl.load(lanes + column + 1, mask=live, other=0) - offset
        block_k = tl.where(shared, shared_k_ptr + head * shared_k_head, k_ptr + head * k_head)
        block_v = tl.where(shared, shared_v_ptr + head * shared_v_head, v_ptr + head * v_head)
        k_step = tl.where(shared, shared_k_row, k_row)
        v_step = tl.where(shared, shared_v_row, v_row)
        inside = keys < bound
        k = tl.load(
            block_k + place[None, :] * k_step + dims[:, None],
            mask=inside[None, :] & (dims < D)[:, None],
            other=0.0,
        )
        v = tl.load(
            block_v + place[:, None] * v_step + columns[None, :],
            mask=inside[:, None] & (columns < DV)[None, :],
            other=0.0,
        )
        acc, total, peak = _attend(
            acc, total, peak, q, k, v, keys, below, behind, scale, softcap, window,
            True, WINDOW, SOFTCAP, WIDEN,
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
