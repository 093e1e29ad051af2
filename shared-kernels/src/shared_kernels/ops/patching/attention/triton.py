"""Attention of many rows in Triton: one program per row, example, head and block of queries."""

import triton
import triton.language as tl

from shared_kernels.ops.triton_math import tanh

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(block, rows, examples):
    """Return head, row and example of a program: rows of one example are side by side."""
    index = block.to(tl.int64)
    return index // rows // examples, index % rows, index // rows % examples


@triton.jit
def _finish(s, scale, softcap, SOFTCAP: tl.constexpr):
    s *= scale
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    return s


@triton.jit(do_not_specialize=["scale", "softcap", "window"])
def block_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    base_ptr,
    kv_ptr,
    out_ptr,
    rows,
    examples,
    tokens,
    blocks,
    q_head,
    q_row,
    q_example,
    q_token,
    k_head,
    k_row,
    k_example,
    k_token,
    v_head,
    v_row,
    v_example,
    v_token,
    scale,
    softcap,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
):
    """Attend from BQ queries, query i at position i, and subtract the base.

    The width is taken BD entries at a time, and keys BK at a time, with a running softmax.
    """
    head, row, example = _place(tl.program_id(0) // blocks, rows, examples)
    first = tl.program_id(0) % blocks * BQ
    shared = tl.load(kv_ptr + head)
    q_ptr += head * q_head + row * q_row + example * q_example
    k_ptr += shared * k_head + row * k_row + example * k_example
    v_ptr += shared * v_head + row * v_row + example * v_example
    query = first + tl.arange(0, BQ)
    live = query < tokens
    inner = tl.arange(0, BD)
    column = tl.arange(0, BDV)
    wide = column < DV
    q_ptr += query.to(tl.int64)[:, None] * q_token + inner[None, :]
    acc = tl.zeros((BQ, BDV), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    peak = tl.full((BQ,), float("-inf"), tl.float32)
    begin = 0
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BK * BK
    end = tokens
    if CAUSAL:
        end = tl.minimum(first + BQ, tokens)
    for low in range(begin, end, BK):
        key = low + tl.arange(0, BK)
        known = key < tokens
        keys = k_ptr + key.to(tl.int64)[None, :] * k_token + inner[:, None]
        s = tl.zeros((BQ, BK), tl.float32)
        for entry in tl.static_range(0, D, BD):
            inside = entry + inner < D
            q = tl.load(q_ptr + entry, mask=live[:, None] & inside[None, :], other=0.0)
            k = tl.load(keys + entry, mask=known[None, :] & inside[:, None], other=0.0)
            s = tl.dot(q, k, s, input_precision="tf32x3")
        s = _finish(s, scale, softcap, SOFTCAP)
        seen = known[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= query[:, None])
        if WINDOW:
            seen = seen & (query[:, None] - key[None, :] < window)
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2((s - safe[:, None]) * _LOG2E)
        shrink = tl.exp2((peak - safe) * _LOG2E)
        v = tl.load(
            v_ptr + key.to(tl.int64)[:, None] * v_token + column[None, :],
            mask=known[:, None] & wide[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision="tf32x3")
        peak = higher
    mask = live[:, None] & wide[None, :]
    place = query[:, None] * DV + column[None, :]
    base = tl.load(
        base_ptr + (head * examples + example) * tokens * DV + place, mask=mask, other=0.0
    )
    out_ptr += ((head * rows + row) * examples + example) * tokens * DV
    tl.store(out_ptr + place, (acc / total[:, None] - base).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale", "softcap", "window"])
def query_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    base_ptr,
    kv_ptr,
    at_ptr,
    out_ptr,
    rows,
    examples,
    tokens,
    q_head,
    q_row,
    q_example,
    k_head,
    k_row,
    k_example,
    k_token,
    v_head,
    v_row,
    v_example,
    v_token,
    scale,
    softcap,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BK: tl.constexpr,
):
    """Attend from one query, BK keys at a time, and subtract the base."""
    head, row, example = _place(tl.program_id(0), rows, examples)
    shared = tl.load(kv_ptr + head)
    q_ptr += head * q_head + row * q_row + example * q_example
    k_ptr += shared * k_head + row * k_row + example * k_example
    v_ptr += shared * v_head + row * v_row + example * v_example
    position = tl.load(at_ptr + example)
    inner = tl.arange(0, BD)
    column = tl.arange(0, BDV)
    q = tl.load(q_ptr + inner, mask=inner < D, other=0.0)
    acc = tl.zeros((BDV,), tl.float32)
    total = tl.zeros((1,), tl.float32)
    peak = tl.full((1,), float("-inf"), tl.float32)
    end = tokens
    if CAUSAL:
        end = tl.minimum(position + 1, tokens)
    begin = 0
    if WINDOW:
        begin = tl.maximum(position - window + 1, 0)
    for low in range(begin, end, BK):
        key = low + tl.arange(0, BK)
        seen = key < end
        k = tl.load(
            k_ptr + key[:, None] * k_token + inner[None, :],
            mask=seen[:, None] & (inner < D)[None, :],
            other=0.0,
        )
        s = _finish(tl.sum(k * q[None, :], 1), scale, softcap, SOFTCAP)
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 0))
        p = tl.exp2((s - higher) * _LOG2E)
        shrink = tl.exp2((peak - higher) * _LOG2E)
        v = tl.load(
            v_ptr + key[:, None] * v_token + column[None, :],
            mask=seen[:, None] & (column < DV)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)
        peak = higher
    base_ptr += (head * examples + example) * DV
    out_ptr += ((head * rows + row) * examples + example) * DV
    base = tl.load(base_ptr + column, mask=column < DV, other=0.0)
    tl.store(out_ptr + column, (acc / total - base).to(out_ptr.dtype.element_ty), mask=column < DV)
