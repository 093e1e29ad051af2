"""Segment operations in Triton. 64-bit offsets, masked accesses, sums in an order fixed by shapes.

``WIDEN`` turns 16-bit operands into float32 before a dot, which the interpreter needs.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, rows, columns, row_stride, column_stride, row_mask, width, WIDEN: tl.constexpr):
    """Load the elements at rows x columns, 0 outside the mask or the width."""
    offset = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    x = tl.load(ptr + offset, mask=row_mask[:, None] & (columns < width)[None, :], other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def _gram_tile(
    ptr,
    rows,
    others,
    row_mask,
    other_mask,
    width,
    row_stride,
    column_stride,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the inner products of two blocks of rows."""
    tile = tl.zeros((BT, BT), tl.float32)
    for k in range(0, width, BK):
        columns = k + tl.arange(0, BK)
        x = _load(ptr, rows, columns, row_stride, column_stride, row_mask, width, WIDEN)
        y = _load(ptr, others, columns, row_stride, column_stride, other_mask, width, WIDEN)
        tile = tl.dot(x, tl.trans(y), tile, input_precision="ieee")
    return tile


@triton.jit
def gram_kernel(
    a_ptr,
    g_ptr,
    cu_ptr,
    n2_ptr,
    absolute_ptr,
    d,
    p,
    a_row,
    a_column,
    g_row,
    g_column,
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

    With ``TOKENS`` the first matrix is a vector of tokens and their equality its Gram matrix.
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
        rows = start + i * BT + tl.arange(0, BT)
        others = start + j * BT + tl.arange(0, BT)
        row_mask = rows < end
        other_mask = others < end
        tile = _gram_tile(
            g_ptr, rows, others, row_mask, other_mask, p, g_row, g_column, WIDEN, BT, BK
        )
        if TOKENS:
            row_token = tl.load(a_ptr + rows.to(tl.int64) * a_row, mask=row_mask, other=0)
            other_token = tl.load(a_ptr + others.to(tl.int64) * a_row, mask=other_mask, other=0)
            same = row_token[:, None] == other_token[None, :]
            if PADDING:
                same = same & (row_token != padding)[:, None]
            tile = tl.where(same, tile, 0.0)
        weight = tl.where(i == j, 1.0, 2.0)
        if not TOKENS:
            inputs = _gram_tile(
                a_ptr, rows, others, row_mask, other_mask, d, a_row, a_column, WIDEN, BT, BK
            )
            if BIAS:
                inputs += 1.0
            # a bias's 1 stands outside the unit too
            lost = LOST * tl.where(row_mask[:, None] & other_mask[None, :], tl.abs(inputs), 0.0)
            absolute += weight * tl.sum(tl.sum(LOST * tl.abs(tile) + lost, 1), 0)
            tile *= inputs
        n2 += weight * tl.sum(tl.sum(tile, 1), 0)
        absolute += weight * tl.sum(tl.sum(tl.abs(tile), 1), 0)
    tl.store(n2_ptr + pid, n2)
    tl.store(absolute_ptr + pid, absolute)


@triton.jit
def _product_tile(
    a_ptr,
    g_ptr,
    start,
    end,
    a_columns,
    g_columns,
    d,
    p,
    a_row,
    a_column,
    g_row,
    g_column,
    WIDEN: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Return a tile of G^T A over the rows from start to end."""
    tile = tl.zeros((BP, BD), tl.float32)
    for k in range(start, end, BK):
        rows = k + tl.arange(0, BK)
        mask = rows < end
        y = _load(g_ptr, rows, g_columns, g_row, g_column, mask, p, WIDEN)
        x = _load(a_ptr, rows, a_columns, a_row, a_column, mask, d, WIDEN)
        tile = tl.dot(tl.trans(y), x, tile, input_precision="ieee")
    return tile


@triton.jit
def mm_norm_kernel(
    a_ptr,
    g_ptr,
    cu_ptr,
    part_ptr,
    d,
    p,
    a_row,
    a_column,
    g_row,
    g_column,
    WIDEN: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Square and sum one tile of one unit's product."""
    pid = tl.program_id(0)
    tiles_d = (d + BD - 1) // BD
    tiles = tiles_d * ((p + BP - 1) // BP)
    unit = pid // tiles
    tile_p = pid % tiles // tiles_d
    tile_d = pid % tiles_d
    tile = _product_tile(
        a_ptr,
        g_ptr,
        tl.load(cu_ptr + unit),
        tl.load(cu_ptr + unit + 1),
        tile_d * BD + tl.arange(0, BD),
        tile_p * BP + tl.arange(0, BP),
        d,
        p,
        a_row,
        a_column,
        g_row,
        g_column,
        WIDEN,
        BP,
        BD,
        BK,
    )
    tl.store(part_ptr + pid, tl.sum(tl.sum(tile * tile, 1), 0))


@triton.jit
def _first_unit_past(cu_ptr, units, row, BITS: tl.constexpr):
    """Return how many units end at or before a row."""
    low = tl.zeros((), tl.int32)
    high = low + units
    for _ in range(BITS):
        middle = (low + high) // 2
        past = tl.load(cu_ptr + middle + 1, mask=low < high, other=0) <= row
        low = tl.where((low < high) & past, middle + 1, low)
        high = tl.where((low < high) & ~past, middle, high)
    return low


@triton.jit
def scaled_mm_kernel(
    a_ptr,
    g_ptr,
    cu_ptr,
    scale_ptr,
    out_ptr,
    units,
    rows,
    d,
    p,
    a_row,
    a_column,
    g_row,
    g_column,
    out_split,
    out_row,
    out_column,
    splits,
    BITS: tl.constexpr,
    ADD: tl.constexpr,
    WIDEN: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Form one tile of the scaled sum over one of ``splits`` equal parts of the rows.

    With ``ADD`` the tile is added to the output, else written to the part's own matrix.
    """
    pid = tl.program_id(0)
    tiles_d = (d + BD - 1) // BD
    tiles = tiles_d * ((p + BP - 1) // BP)
    split = pid // tiles
    a_columns = pid % tiles_d * BD + tl.arange(0, BD)
    g_columns = pid % tiles // tiles_d * BP + tl.arange(0, BP)
    first_row = (split.to(tl.int64) * rows // splits).to(tl.int32)
    last_row = ((split.to(tl.int64) + 1) * rows // splits).to(tl.int32)

    total = tl.zeros((BP, BD), tl.float32)
    first = _first_unit_past(cu_ptr, units, first_row, BITS)
    # the units that begin before the last row: those that end before it, and one more
    last = tl.minimum(_first_unit_past(cu_ptr, units, last_row - 1, BITS) + 1, units)
    for unit in range(first, last):
        scale = tl.load(scale_ptr + unit)
        if scale != 0.0:
            start = tl.maximum(tl.load(cu_ptr + unit), first_row)
            end = tl.minimum(tl.load(cu_ptr + unit + 1), last_row)
            tile = _product_tile(
                a_ptr,
                g_ptr,
                start,
                end,
                a_columns,
                g_columns,
                d,
                p,
                a_row,
                a_column,
                g_row,
                g_column,
                WIDEN,
                BP,
                BD,
                BK,
            )
            total += scale * tile

    offset = (
        split.to(tl.int64) * out_split
        + g_columns.to(tl.int64)[:, None] * out_row
        + a_columns.to(tl.int64)[None, :] * out_column
    )
    mask = (g_columns < p)[:, None] & (a_columns < d)[None, :]
    if ADD:
        total += tl.load(out_ptr + offset, mask=mask, other=0.0)
    tl.store(out_ptr + offset, total, mask=mask)


@triton.jit
def squares_kernel(x_ptr, part_ptr, size, parts, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Square and sum ``STEPS`` blocks of one contiguous matrix of ``size`` elements."""
    matrix = tl.program_id(0) // parts
    first = tl.program_id(0) % parts * (STEPS * BLOCK)
    x_ptr += matrix.to(tl.int64) * size
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        index = first + step * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size, other=0.0)
        total += x * x
    tl.store(part_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def factor_of(n2, threshold, stability, AUTOMATIC: tl.constexpr, SHRINK: tl.constexpr):
    """Return the factors of squared norms, see `reference.clip_factors`."""
    # comparisons with NaN are false: a norm that is not finite never gets a factor
    norm = tl.sqrt_rn(tl.where(n2 >= 0.0, n2, float("nan")))
    if AUTOMATIC:
        factor = tl.div_rn(threshold + tl.zeros_like(norm), norm + stability)
    else:
        # a norm of 0 would divide by it
        quotient = tl.div_rn(threshold + tl.zeros_like(norm), tl.where(norm > 0, norm, 1.0))
        factor = tl.where(norm <= threshold, 1.0, quotient)
    factor = tl.where(threshold == float("inf"), factor, factor * SHRINK)
    return tl.where((norm < float("inf")) & (factor < float("inf")), factor, 0.0)


@triton.jit(
    do_not_specialize=["first", "length", "stability"],
    do_not_specialize_on_alignment=["n2_ptr"],
)
def factors_kernel(
    part_ptr,
    cu_ptr,
    threshold_ptr,
    n2_ptr,
    factor_ptr,
    parts,
    first,
    length,
    stability,
    CHECK: tl.constexpr,
    AUTOMATIC: tl.constexpr,
    SHRINK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one unit's squares, and make its factor, see `reference.clip_factors`.

    ``CHECK`` makes the norm NaN of a unit whose rows are not at ``length`` times its number
    ("equal"), or are more than ``length`` ("longest").
    """
    unit = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, parts, BLOCK):
        index = k + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + unit * parts + index, mask=index < parts, other=0.0)
    n2 = tl.sum(total, 0)
    if CHECK != "none":
        start = tl.load(cu_ptr + first + unit)
        end = tl.load(cu_ptr + first + unit + 1)
        if CHECK == "equal":
            kept = (start == (first + unit) * length) & (end - start == length)
        else:
            kept = end - start <= length
        n2 = tl.where(kept, n2, float("nan"))
    if n2_ptr is not None:
        tl.store(n2_ptr + unit, n2)
    factor = factor_of(n2, tl.load(threshold_ptr), stability, AUTOMATIC, SHRINK)
    tl.store(factor_ptr + unit, factor)


@triton.jit(do_not_specialize=["units"])
def certify_kernel(
    n2_ptr, absolute_ptr, cu_ptr, out_ptr, units, steps, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the bound of rounding errors to Gram norms, see `reference.certified_norm`."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < units
    n2 = tl.load(n2_ptr + index, mask=mask, other=0.0)
    absolute = tl.load(absolute_ptr + index, mask=mask, other=0.0)
    start = tl.load(cu_ptr + index, mask=mask, other=0)
    length = (tl.load(cu_ptr + index + 1, mask=mask, other=0) - start).to(tl.float32)
    bound = (tl.sqrt_rn(length) + steps) * (EPS * absolute)
    tl.store(out_ptr + index, tl.where(n2 < 0.0, 0.0, n2) + bound, mask=mask)


@triton.jit
def combine_kernel(
    product_ptr, scale_ptr, out_ptr, count, p, d, out_row, out_column, ADD: tl.constexpr,
    BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add up ``count`` contiguous (p, d) matrices, each times its scale, in one tile of the output.

    With ``ADD`` the sum is added to the output, else written over it.
    """
    tiles_d = (d + BD - 1) // BD
    rows = (tl.program_id(0) // tiles_d * BP + tl.arange(0, BP)).to(tl.int64)[:, None]
    columns = (tl.program_id(0) % tiles_d * BD + tl.arange(0, BD)).to(tl.int64)[None, :]
    mask = (rows < p) & (columns < d)
    out = out_ptr + rows * out_row + columns * out_column
    total = tl.load(out, mask=mask, other=0.0) if ADD else tl.zeros((BP, BD), tl.float32)
    inside = rows * d + columns
    for index in range(count):
        scale = tl.load(scale_ptr + index)
        if scale != 0.0:
            matrix = product_ptr + tl.cast(index, tl.int64) * p * d
            total += scale * tl.load(matrix + inside, mask=mask, other=0.0)
    tl.store(out, total, mask=mask)


@triton.jit
def sums_kernel(
    x_ptr,
    g_ptr,
    cu_ptr,
    out_ptr,
    h,
    x_row,
    x_column,
    g_row,
    g_column,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """Sum a block of columns of x, or of x * g where ``g_ptr`` is given, over one unit's rows."""
    tiles = (h + BH - 1) // BH
    unit = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * BH + tl.arange(0, BH)
    start = tl.load(cu_ptr + unit)
    end = tl.load(cu_ptr + unit + 1)
    total = tl.zeros((BT, BH), tl.float32)
    for k in range(start, end, BT):
        rows = k + tl.arange(0, BT)
        x = _load(x_ptr, rows, columns, x_row, x_column, rows < end, h, True)
        if g_ptr is not None:
            x *= _load(g_ptr, rows, columns, g_row, g_column, rows < end, h, True)
        total += x
    offset = unit.to(tl.int64) * h + columns
    tl.store(out_ptr + offset, tl.sum(total, 0), mask=columns < h)


@triton.jit
def embedding_kernel(
    token_ptr,
    order_ptr,
    scale_ptr,
    g_ptr,
    out_ptr,
    rows,
    h,
    vocabulary,
    padding,
    g_row,
    g_column,
    out_row,
    out_column,
    PADDING: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    """Add the rows of one token; programs at the first row of a run of sorted tokens do it."""
    tiles = (h + BH - 1) // BH
    row = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * BH + tl.arange(0, BH)
    token = tl.load(token_ptr + row)
    before = tl.load(token_ptr + row - 1, mask=row > 0, other=-1)
    begins = (token != before) & (token >= 0) & (token < vocabulary)
    if PADDING:
        begins = begins & (token != padding)
    if begins:
        total = tl.zeros((BR, BH), tl.float32)
        more = begins
        while more:
            index = row + tl.arange(0, BR)
            same = tl.load(token_ptr + index, mask=index < rows, other=-1) == token
            source = tl.load(order_ptr + index, mask=same, other=0)
            scale = tl.load(scale_ptr + source, mask=same, other=0.0)
            x = _load(g_ptr, source, columns, g_row, g_column, same & (scale != 0.0), h, True)
            total += scale[:, None] * x
            more = tl.sum(same.to(tl.int32), 0) == BR
            row += BR
        offset = token.to(tl.int64) * out_row + columns.to(tl.int64) * out_column
        kept = tl.load(out_ptr + offset, mask=columns < h, other=0.0)
        tl.store(out_ptr + offset, kept + tl.sum(total, 0), mask=columns < h)
