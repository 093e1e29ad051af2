"""Decoding attention in Triton: the prefix by tiles of slots, own keys slot by slot, a merge.

Keys are cut into splits of a fixed size; a program takes one and leaves at once if its slot is not
as long. What a slot computes thus depends on its own keys alone. A part's log-sum-exp is to base 2.
"""

import triton
import triton.language as tl

from shared_kernels.ops.prefix_attention.triton import _attend

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _store_part(acc, total, peak, parts_ptr, sums_ptr, place, mask, columns, DV: tl.constexpr):
    """Store normalised parts at ``place``, counted in parts."""
    empty = total == 0.0
    part = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(
        parts_ptr + place[:, None] * DV + columns[None, :],
        part,
        mask=mask[:, None] & (columns < DV)[None, :],
    )
    lse = peak + tl.log2(tl.where(empty, 1.0, total))
    tl.store(sums_ptr + place, tl.where(empty, float("-inf"), lse), mask=mask)


@triton.jit
def _walk(
    q,
    k_ptr,
    v_ptr,
    first,
    begin,
    end,
    visible,
    ahead,
    k_row,
    v_row,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend to the keys ``begin .. end`` behind row ``first`` of one head."""
    acc = tl.zeros((BM, BDV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    dims = tl.arange(0, BD)
    columns = tl.arange(0, BDV)
    visible = tl.minimum(visible, end)
    for n in range(begin, end, BN):
        index = n + tl.arange(0, BN)
        inside = index < end
        place = first + index.to(tl.int64)
        k = tl.load(
            k_ptr + place[None, :] * k_row + dims[:, None],
            mask=inside[None, :] & (dims < D)[:, None],
            other=0.0,
        )
        v = tl.load(
            v_ptr + place[:, None] * v_row + columns[None, :],
            mask=inside[:, None] & (columns < DV)[None, :],
            other=0.0,
        )
        acc, total, peak = _attend(
            acc, total, peak, q, k, v, index, visible, ahead, scale, softcap, window,
            True, WINDOW, SOFTCAP, WIDEN,
        )  # fmt: skip
    return acc, total, peak


@triton.jit
def _shared_size(length, SHARED: tl.constexpr):
    """Return the keys of a split of a prefix: a short one is cut finer, by its own length alone."""
    return tl.where(length <= SHARED, SHARED // 4, SHARED)


@triton.jit(
    do_not_specialize=[
        "slots", "walkers", "capacity", "splits", "offset", "own_splits", "key_heads", "scale",
        "softcap", "window",
    ]
)  # fmt: skip
def decode_parts_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    shared_k_ptr,
    shared_v_ptr,
    parts_ptr,
    sums_ptr,
    lengths_ptr,
    starts_ptr,
    prefix_lengths_ptr,
    order_ptr,
    tiles_ptr,
    slots,
    walkers,
    capacity,
    splits,
    offset,
    own_splits,
    key_heads,
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
    OWN: tl.constexpr,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM_OWN: tl.constexpr,
    BM_SHARED: tl.constexpr,
    BN: tl.constexpr,
    BN_SHARED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend from a tile of slots to a split of their prefix, or from a slot to one of its own.

    Both in one launch: the programs of prefixes take long, and begin first; ``walkers`` of them
    share the tiles of a head and a split. ``offset`` splits of a prefix come before the own ones.
    Scales are for base-2 exponentials.
    """
    program = tl.program_id(0)
    dims = tl.arange(0, BD)
    heads = key_heads * GROUP
    if program < walkers * key_heads * offset:
        head = program % key_heads
        split = program // key_heads % offset
        tile = program // key_heads // offset
        count = tl.load(tiles_ptr + slots + 1 + tile).to(tl.int32)
        while count > 0:
            member = tl.load(tiles_ptr + tile)
            leader = tl.load(order_ptr + member)
            length = tl.load(prefix_lengths_ptr + leader).to(tl.int32)
            size = _shared_size(length, SHARED)
            begin = split * size
            if begin < length:
                end = tl.minimum(length, begin + size)
                lane = tl.arange(0, BM_SHARED)
                live = lane < count * GROUP
                slot = tl.load(order_ptr + member + lane // GROUP, mask=live, other=0)
                query_head = head * GROUP + lane % GROUP
                q = tl.load(
                    q_ptr + slot[:, None] * q_row + query_head[:, None] * q_head + dims[None, :],
                    mask=live[:, None] & (dims < D)[None, :],
                    other=0.0,
                )
                if WIDEN:
                    q = q.to(tl.float32)
                own = tl.load(lengths_ptr + slot, mask=live, other=0).to(tl.int32)
                acc, total, peak = _walk(
                    q, shared_k_ptr + head * shared_k_head, shared_v_ptr + head * shared_v_head,
                    tl.load(starts_ptr + leader), begin, end, lane * 0 + length, length + own - 1,
                    shared_k_row, shared_v_row, scale, softcap, window,
                    D, DV, BD, BDV, BM_SHARED, BN_SHARED, WINDOW, SOFTCAP, WIDEN,
                )  # fmt: skip
                place = (slot * heads + query_head) * splits + split
                _store_part(
                    acc, total, peak, parts_ptr, sums_ptr, place, live, tl.arange(0, BDV), DV
                )  # fmt: skip
            tile += walkers
            # the entry behind those of the slots is zero
            count = tl.load(tiles_ptr + slots + 1 + tl.minimum(tile, slots)).to(tl.int32)
    else:
        program -= walkers * key_heads * offset
        split = program % own_splits
        head = program // own_splits % key_heads
        slot = (program // own_splits // key_heads).to(tl.int64)
        length = tl.load(lengths_ptr + slot).to(tl.int32)
        begin = split * OWN
        if begin < length:
            end = tl.minimum(length, begin + OWN)
            lane = tl.arange(0, BM_OWN)
            live = lane < GROUP
            query_head = head * GROUP + lane
            q = tl.load(
                q_ptr + slot * q_row + query_head[:, None] * q_head + dims[None, :],
                mask=live[:, None] & (dims < D)[None, :],
                other=0.0,
            )
            if WIDEN:
                q = q.to(tl.float32)
            visible = lane * 0 + length
            acc, total, peak = _walk(
                q, k_ptr + head * k_head, v_ptr + head * v_head, slot * capacity, begin, end,
                visible, visible - 1, k_row, v_row, scale, softcap, window,
                D, DV, BD, BDV, BM_OWN, BN, WINDOW, SOFTCAP, WIDEN,
            )  # fmt: skip
            place = (slot * heads + query_head) * splits + offset + split
            _store_part(
                acc, total, peak, parts_ptr, sums_ptr, place, live, tl.arange(0, BDV), DV
            )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "offset"])
def decode_merge_kernel(
    parts_ptr,
    sums_ptr,
    lengths_ptr,
    prefix_lengths_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    splits,
    offset,
    OWN: tl.constexpr,
    SHARED: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
):
    """Merge the parts of one (slot, head) in the order of their keys."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = slot * tl.num_programs(1) + head
    columns = tl.arange(0, BDV)
    length = tl.load(lengths_ptr + slot)
    own = tl.cdiv(length, OWN)
    prefix = tl.load(prefix_lengths_ptr + slot)
    shared = tl.where(length > 0, tl.cdiv(prefix, _shared_size(prefix, SHARED)), 0)
    acc = tl.zeros((BDV,), tl.float32)
    total = tl.zeros((), tl.float32)
    peak = tl.full((), float("-inf"), tl.float32)
    if sinks_ptr is not None:
        peak = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        total += 1.0
    for step in range(shared + own):
        place = pair * splits + tl.where(step < shared, step, offset + step - shared)
        lse = tl.load(sums_ptr + place)
        part = tl.load(parts_ptr + place * DV + columns, mask=columns < DV, other=0.0)
        higher = tl.maximum(peak, lse)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - safe)
        weight = tl.exp2(lse - safe)
        acc = acc * shrink + weight * part
        total = total * shrink + weight
        peak = higher
    empty = (total == 0.0) | (length == 0)
    out = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, total))
    tl.store(
        out_ptr + pair * DV + columns, out.to(out_ptr.dtype.element_ty), mask=columns < DV
    )  # fmt: skip
    lse = (peak + tl.log2(tl.where(empty, 1.0, total))) * _LN2
    tl.store(lse_ptr + pair, tl.where(empty, float("-inf"), lse))
