"""Segment operations in Triton over tensor descriptors, for 16-bit rows on Hopper and later.

Same definitions as in `triton.py`. Whole blocks of rows and columns come through the copy engine,
which leaves registers and issue slots to the tensor cores; what lies outside a matrix reads as 0.
"""

import triton
import triton.language as tl

from shared_kernels.ops.dp.triton import factor_of


@triton.jit
def _dot(x, y, total, WIDEN: tl.constexpr):
    if WIDEN:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit(do_not_specialize=["parts", "padding"])
def gram_kernel(
    a,
    g,
    token_ptr,
    cu_ptr,
    n2_ptr,
    absolute_ptr,
    d,
    p,
    parts,
    padding,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDING: tl.constexpr,
    LOST: tl.constexpr,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Sum every ``parts``-th tile of the lower triangle of one unit's Gram product.

    A tile may reach into the next unit's rows, so what is outside the unit is left out of the
    product and not of the loads.
    """
    pid = tl.program_id(0)
    unit = pid // parts
    start = tl.load(cu_ptr + unit)
    end = tl.load(cu_ptr + unit + 1)
    blocks = (end - start + BT - 1) // BT
    n2 = tl.zeros((), tl.float32)
    absolute = tl.zeros((), tl.float32)
    for pair in range(pid % parts, blocks * (blocks + 1) // 2, parts):
        # pair = i (i + 1) / 2 + j; the root is rounded, so it may be one off
        i = ((tl.sqrt(8.0 * tl.cast(pair, tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > pair, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= pair, i + 1, i)
        j = pair - i * (i + 1) // 2
        row = start + i * BT
        other = start + j * BT
        rows = row + tl.arange(0, BT)
        others = other + tl.arange(0, BT)
        tile = tl.zeros((BT, BT), tl.float32)
        for k in range(0, p, BK):
            tile = _dot(g.load([row, k]), tl.trans(g.load([other, k])), tile, WIDEN)
        inside = (rows < end)[:, None] & (others < end)[None, :]
        weight = tl.where(i == j, 1.0, 2.0)
        if TOKENS:
            row_token = tl.load(token_ptr + rows, mask=rows < end, other=0)
            other_token = tl.load(token_ptr + others, mask=others < end, other=0)
            inside = inside & (row_token[:, None] == other_token[None, :])
            if PADDING:
                inside = inside & (row_token != padding)[:, None]
        else:
            inputs = tl.zeros((BT, BT), tl.float32)
            for k in range(0, d, BK):
                inputs = _dot(a.load([row, k]), tl.trans(a.load([other, k])), inputs, WIDEN)
            if BIAS:
                inputs += 1.0
            lost = tl.where(inside, LOST * (tl.abs(tile) + tl.abs(inputs)), 0.0)
            absolute += weight * tl.sum(tl.sum(lost, 1), 0)
            tile *= inputs
        tile = tl.where(inside, tile, 0.0)
        n2 += weight * tl.sum(tl.sum(tile, 1), 0)
        absolute += weight * tl.sum(tl.sum(tl.abs(tile), 1), 0)
    tl.store(n2_ptr + pid, n2)
    tl.store(absolute_ptr + pid, absolute)


@triton.jit
def _tile_of(index, d, p, BP: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr):
    """Return a tile's row and column; tiles that run together share blocks of both matrices."""
    tiles_d = (d + BD - 1) // BD
    tiles_p = (p + BP - 1) // BP
    width = GROUP * tiles_d
    first = index // width * GROUP
    height = tl.minimum(tiles_p - first, GROUP)
    inside = index % width
    return (first + inside % height) * BP, inside // height * BD


@triton.jit
def product_kernel(
    a,
    g,
    cu_ptr,
    part_ptr,
    out_ptr,
    d,
    p,
    WIDEN: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Square and sum one tile of one unit's product, and write it where ``out_ptr`` is given.

    Boundaries are multiples of ``BK``; the output is contiguous, a matrix per unit.
    """
    pid = tl.program_id(0)
    tiles = ((d + BD - 1) // BD) * ((p + BP - 1) // BP)
    unit = pid // tiles
    first_p, first_d = _tile_of(pid % tiles, d, p, BP, BD, GROUP)
    tile = tl.zeros((BP, BD), tl.float32)
    for k in range(tl.load(cu_ptr + unit), tl.load(cu_ptr + unit + 1), BK):
        tile = _dot(tl.trans(g.load([k, first_p])), a.load([k, first_d]), tile, WIDEN)
    if out_ptr is not None:
        g_columns = first_p + tl.arange(0, BP)
        a_columns = first_d + tl.arange(0, BD)
        offset = (
            unit.to(tl.int64) * p * d + g_columns.to(tl.int64)[:, None] * d + a_columns[None, :]
        )
        tl.store(out_ptr + offset, tile, mask=(g_columns < p)[:, None] & (a_columns < d)[None, :])
    tl.store(part_ptr + pid, tl.sum(tl.sum(tile * tile, 1), 0))


@triton.jit
def _rank(scale_ptr, order_ptr, units, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Write the numbers of the units by the size of their scale, NaN last."""
    index = tl.arange(0, BLOCK)
    size = tl.abs(tl.load(scale_ptr + index, mask=index < units, other=0.0))
    size = tl.where(size == size, size, float("inf"))[:, None]
    rank = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, units, STEP):
        other = first + tl.arange(0, STEP)
        theirs = tl.abs(tl.load(scale_ptr + other, mask=other < units, other=0.0))
        theirs = tl.where(theirs == theirs, theirs, float("inf"))[None, :]
        before = (theirs < size) | ((theirs == size) & (other[None, :] < index[:, None]))
        rank += tl.sum((before & (other < units)[None, :]).to(tl.int32), 1)
    tl.store(order_ptr + rank, index, mask=index < units)


@triton.jit
def _check_multiples(cu_ptr, order_ptr, units, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr):
    """Note behind the order whether a boundary is no multiple."""
    index = tl.arange(0, BLOCK)
    bound = tl.load(cu_ptr + index + 1, mask=index < units, other=0)
    tl.store(order_ptr + units, tl.max((bound % MULTIPLE != 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["units"])
def order_kernel(
    scale_ptr, cu_ptr, order_ptr, units, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Rank units for `scaled_mm_kernel`."""
    _rank(scale_ptr, order_ptr, units, BLOCK, STEP)
    _check_multiples(cu_ptr, order_ptr, units, MULTIPLE, BLOCK)


@triton.jit(do_not_specialize=["units", "steps", "stability"])
def finish_kernel(
    part_ptr,
    cu_ptr,
    threshold_ptr,
    n2_ptr,
    factor_ptr,
    order_ptr,
    units,
    parts,
    steps,
    stability,
    AUTOMATIC: tl.constexpr,
    SHRINK: tl.constexpr,
    EPS: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Make certified norms and factors of the partial sums of `gram_kernel`, and rank the units.

    ``part_ptr`` holds the parts of the norms, then those of the absolute values.
    """
    index = tl.arange(0, BLOCK)
    real = index < units
    norms = tl.zeros((BLOCK, COLUMNS), tl.float32)
    sizes = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for first in range(0, parts, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = real[:, None] & (column < parts)[None, :]
        offset = index[:, None] * parts + column[None, :]
        norms += tl.load(part_ptr + offset, mask=mask, other=0.0)
        sizes += tl.load(part_ptr + units * parts + offset, mask=mask, other=0.0)
    n2 = tl.sum(norms, 1)
    absolute = tl.sum(sizes, 1)
    start = tl.load(cu_ptr + index, mask=real, other=0)
    length = (tl.load(cu_ptr + index + 1, mask=real, other=0) - start).to(tl.float32)
    n2 = tl.where(n2 < 0.0, 0.0, n2) + (tl.sqrt_rn(length) + steps) * (EPS * absolute)
    tl.store(n2_ptr + index, n2, mask=real)
    factor = factor_of(n2, tl.load(threshold_ptr), stability, AUTOMATIC, SHRINK)
    tl.store(factor_ptr + index, factor, mask=real)
    # ranking reads the factors of other threads
    tl.debug_barrier()
    _rank(factor_ptr, order_ptr, units, BLOCK, STEP)
    _check_multiples(cu_ptr, order_ptr, units, MULTIPLE, BLOCK)


@triton.jit(do_not_specialize=["units", "splits"])
def scaled_mm_kernel(
    a,
    g,
    cu_ptr,
    order_ptr,
    scale_ptr,
    out_ptr,
    units,
    d,
    p,
    out_split,
    out_row,
    out_column,
    splits,
    ADD: tl.constexpr,
    WIDEN: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Form one tile of the scaled sum over every ``splits``-th unit, by rising scale.

    One accumulator serves all units: before a unit is added, what is there is multiplied by the
    last scale over its own, a number of at most 1, and at the end by the largest scale::

        S = ((M_1 s_1/s_2 + M_2) s_2/s_3 + M_3) s_3
    """
    pid = tl.program_id(0)
    tiles = ((d + BD - 1) // BD) * ((p + BP - 1) // BP)
    split = pid // tiles
    first_p, first_d = _tile_of(pid % tiles, d, p, BP, BD, GROUP)
    tile = tl.zeros((BP, BD), tl.float32)
    last = 0.0
    for index in range(split, units, splits):
        unit = tl.load(order_ptr + index)
        scale = tl.load(scale_ptr + unit)
        start = tl.load(cu_ptr + unit)
        # the smallest come first: nothing has been summed yet where a scale is 0
        end = tl.where(scale == 0.0, start, tl.load(cu_ptr + unit + 1))
        tile *= tl.div_rn(last, tl.where(scale == 0.0, 1.0, scale))
        last = scale
        for k in range(start, end, BK):
            tile = _dot(tl.trans(g.load([k, first_p])), a.load([k, first_d]), tile, WIDEN)
    tile *= tl.where(tl.load(order_ptr + units) == 0, last, float("nan"))

    g_columns = first_p + tl.arange(0, BP)
    a_columns = first_d + tl.arange(0, BD)
    offset = (
        split.to(tl.int64) * out_split
        + g_columns.to(tl.int64)[:, None] * out_row
        + a_columns.to(tl.int64)[None, :] * out_column
    )
    mask = (g_columns < p)[:, None] & (a_columns < d)[None, :]
    if ADD:
        tile += tl.load(out_ptr + offset, mask=mask, other=0.0)
    tl.store(out_ptr + offset, tile, mask=mask)
