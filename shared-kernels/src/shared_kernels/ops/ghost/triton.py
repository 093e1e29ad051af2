"""Ghost operations in Triton. 64-bit offsets, masked accesses, sums in an order fixed by shapes.

``WIDEN`` turns 16-bit operands into float32 before a dot, which the interpreter needs. Rows are
tokens of samples, numbered through; ``FLAT`` says that one stride leads from each to the next.
"""

import triton
import triton.language as tl

from shared_kernels.random.triton import draw_groups


@triton.jit
def _row_offsets(rows, tokens, sample_stride, token_stride, FLAT: tl.constexpr):
    """Return where rows of a (samples, tokens, columns) tensor begin; rows are int64."""
    if FLAT:
        offsets = rows * token_stride
    else:
        offsets = rows // tokens * sample_stride + rows % tokens * token_stride
    return offsets


@triton.jit
def _live(ptr, rows, live, tokens, sample_stride, token_stride, FLAT: tl.constexpr):
    """Return which rows count: those of ``live``, and of the mask if there is one."""
    if ptr is not None:
        offsets = _row_offsets(rows, tokens, sample_stride, token_stride, FLAT)
        live = live & (tl.load(ptr + offsets, mask=live, other=0) != 0)
    return live


@triton.jit
def _load(ptr, offsets, columns, column_stride, live, width, WIDEN: tl.constexpr):
    """Load rows that begin at ``offsets``, 0 where they do not count or outside the width."""
    place = offsets[:, None] + columns.to(tl.int64)[None, :] * column_stride
    x = tl.load(ptr + place, mask=live[:, None] & (columns < width)[None, :], other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot_kernel(
    x_ptr,
    d_ptr,
    y_ptr,
    mask_ptr,
    part_ptr,
    rows,
    tokens,
    i,
    o,
    x_sample,
    x_token,
    x_column,
    d_sample,
    d_token,
    d_column,
    y_query,
    y_row,
    y_column,
    mask_sample,
    mask_token,
    splits,
    FLAT: tl.constexpr,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """Write ``sum_o d_o (Y x)_o`` of a block of rows over one of ``splits`` parts of the outputs.

    ``parts`` is (queries, splits, rows).
    """
    blocks = (rows + BT - 1) // BT
    pid = tl.program_id(0)
    part = (pid // blocks).to(tl.int64)
    split = part % splits
    row = (pid % blocks).to(tl.int64) * BT + tl.arange(0, BT)
    live = _live(mask_ptr, row, row < rows, tokens, mask_sample, mask_token, FLAT)
    x_offsets = _row_offsets(row, tokens, x_sample, x_token, FLAT)
    d_offsets = _row_offsets(row, tokens, d_sample, d_token, FLAT)
    y_ptr += part // splits * y_query
    tiles = (o + BO - 1) // BO
    total = tl.zeros((BT,), tl.float32)
    for tile in range((split * tiles // splits).to(tl.int32),
                      ((split + 1) * tiles // splits).to(tl.int32)):  # fmt: skip
        outputs = tile * BO + tl.arange(0, BO)
        y_offsets = outputs.to(tl.int64) * y_row
        made = tl.zeros((BT, BO), tl.float32)
        for k in range(0, i, BK):
            columns = k + tl.arange(0, BK)
            x = _load(x_ptr, x_offsets, columns, x_column, live, i, WIDEN)
            y = _load(y_ptr, y_offsets, columns, y_column, outputs < o, i, WIDEN)
            made = tl.dot(x, tl.trans(y), made, input_precision="ieee")
        d = _load(d_ptr, d_offsets, outputs, d_column, live, o, True)
        total += tl.sum(made * d, 1)
    tl.store(part_ptr + part * rows + row, total, mask=row < rows)


@triton.jit
def _side(
    ptr,
    offsets,
    live,
    column_stride,
    width,
    factor_ptr,
    factor_row,
    factor_column,
    columns,
    rank,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Return a block of rows times some columns of a factor (width, rank)."""
    made = tl.zeros((BT, BR), tl.float32)
    for k in range(0, width, BK):
        inner = k + tl.arange(0, BK)
        x = _load(ptr, offsets, inner, column_stride, live, width, WIDEN)
        place = inner.to(tl.int64) * factor_row
        factor = _load(factor_ptr, place, columns, factor_column, inner < width, rank, WIDEN)
        made = tl.dot(x, factor, made, input_precision="ieee")
    return made


@triton.jit
def low_rank_kernel(
    x_ptr,
    d_ptr,
    u_ptr,
    v_ptr,
    mask_ptr,
    part_ptr,
    rows,
    tokens,
    i,
    o,
    rank,
    x_sample,
    x_token,
    x_column,
    d_sample,
    d_token,
    d_column,
    u_query,
    u_row,
    u_column,
    v_query,
    v_row,
    v_column,
    mask_sample,
    mask_token,
    FLAT: tl.constexpr,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Write ``(d^T U) . (x^T V)`` of a block of rows, into ``parts`` (queries, rows)."""
    blocks = (rows + BT - 1) // BT
    pid = tl.program_id(0)
    query = (pid // blocks).to(tl.int64)
    row = (pid % blocks).to(tl.int64) * BT + tl.arange(0, BT)
    live = _live(mask_ptr, row, row < rows, tokens, mask_sample, mask_token, FLAT)
    x_offsets = _row_offsets(row, tokens, x_sample, x_token, FLAT)
    d_offsets = _row_offsets(row, tokens, d_sample, d_token, FLAT)
    u_ptr += query * u_query
    v_ptr += query * v_query
    total = tl.zeros((BT,), tl.float32)
    for low in range(0, rank, BR):
        columns = low + tl.arange(0, BR)
        right = _side(
            x_ptr, x_offsets, live, x_column, i, v_ptr, v_row, v_column, columns, rank,
            WIDEN, BT, BK, BR,
        )  # fmt: skip
        left = _side(
            d_ptr, d_offsets, live, d_column, o, u_ptr, u_row, u_column, columns, rank,
            WIDEN, BT, BK, BR,
        )  # fmt: skip
        total += tl.sum(right * left, 1)
    tl.store(part_ptr + query * rows + row, total, mask=row < rows)


@triton.jit
def _gram_tile(
    ptr1,
    offsets1,
    live1,
    column1,
    ptr2,
    offsets2,
    live2,
    column2,
    width,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the inner products of two blocks of rows of two tensors."""
    tile = tl.zeros((BT, BT), tl.float32)
    for k in range(0, width, BK):
        columns = k + tl.arange(0, BK)
        x = _load(ptr1, offsets1, columns, column1, live1, width, WIDEN)
        y = _load(ptr2, offsets2, columns, column2, live2, width, WIDEN)
        tile = tl.dot(x, tl.trans(y), tile, input_precision="ieee")
    return tile


@triton.jit
def gram_kernel(
    x1_ptr,
    d1_ptr,
    x2_ptr,
    d2_ptr,
    mask1_ptr,
    mask2_ptr,
    part_ptr,
    samples1,
    tokens1,
    samples2,
    tokens2,
    i,
    o,
    x1_sample,
    x1_token,
    x1_column,
    d1_sample,
    d1_token,
    d1_column,
    x2_sample,
    x2_token,
    x2_column,
    d2_sample,
    d2_token,
    d2_column,
    mask1_sample,
    mask1_token,
    mask2_sample,
    mask2_token,
    splits,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
):
    """Sum every ``splits``-th pair of token tiles of a block of samples with another.

    A tile holds T1 tokens of BT / T1 samples of the first set, T2 of BT / T2 of the second.
    ``parts`` is (splits, samples1, samples2).
    """
    S1: tl.constexpr = BT // T1
    S2: tl.constexpr = BT // T2
    blocks1 = (samples1 + S1 - 1) // S1
    blocks2 = (samples2 + S2 - 1) // S2
    pid = tl.program_id(0)
    split = pid // (blocks1 * blocks2)
    base1 = (pid // blocks2 % blocks1).to(tl.int64) * S1
    base2 = (pid % blocks2).to(tl.int64) * S2
    inside = tl.arange(0, BT)
    sample1 = base1 + inside // T1
    sample2 = base2 + inside // T2
    steps2 = (tokens2 + T2 - 1) // T2
    steps = (tokens1 + T1 - 1) // T1 * steps2
    total = tl.zeros((S1, S2), tl.float32)
    for step in range(split, steps, splits):
        token1 = (step // steps2 * T1 + inside % T1).to(tl.int64)
        token2 = (step % steps2 * T2 + inside % T2).to(tl.int64)
        live1 = (sample1 < samples1) & (token1 < tokens1)
        live2 = (sample2 < samples2) & (token2 < tokens2)
        if mask1_ptr is not None:
            place = sample1 * mask1_sample + token1 * mask1_token
            live1 = live1 & (tl.load(mask1_ptr + place, mask=live1, other=0) != 0)
        if mask2_ptr is not None:
            place = sample2 * mask2_sample + token2 * mask2_token
            live2 = live2 & (tl.load(mask2_ptr + place, mask=live2, other=0) != 0)
        tile = _gram_tile(
            x1_ptr, sample1 * x1_sample + token1 * x1_token, live1, x1_column,
            x2_ptr, sample2 * x2_sample + token2 * x2_token, live2, x2_column,
            i, WIDEN, BT, BK,
        )  # fmt: skip
        tile *= _gram_tile(
            d1_ptr, sample1 * d1_sample + token1 * d1_token, live1, d1_column,
            d2_ptr, sample2 * d2_sample + token2 * d2_token, live2, d2_column,
            o, WIDEN, BT, BK,
        )  # fmt: skip
        by_sample = tl.sum(tl.reshape(tile, (BT, S2, T2)), 2)
        total += tl.sum(tl.reshape(by_sample, (S1, T1, S2)), 1)
    first = base1 + tl.arange(0, S1)
    second = base2 + tl.arange(0, S2)
    place = (split.to(tl.int64) * samples1 + first)[:, None] * samples2 + second[None, :]
    mask = (first < samples1)[:, None] & (second < samples2)[None, :]
    tl.store(part_ptr + place, total, mask=mask)


@triton.jit
def _put(place, tile, mask, ADD: tl.constexpr):
    """Store a tile, with ``ADD`` added to what is there."""
    if ADD:
        tile += tl.load(place, mask=mask, other=0.0)
    tl.store(place, tile, mask=mask)


@triton.jit
def cov_kernel(
    x_ptr,
    mask_ptr,
    weight_ptr,
    out_ptr,
    rows,
    tokens,
    width,
    x_sample,
    x_token,
    x_column,
    mask_sample,
    mask_token,
    weight_sample,
    weight_token,
    out_split,
    out_row,
    out_column,
    splits,
    FLAT: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Form a tile of ``X^T diag(w) X`` and its mirror image over one of ``splits`` parts of rows.

    With ``ADD`` they are added to the output, else written to the part's own matrix. Programs above
    the diagonal have nothing to do.
    """
    tiles = (width + BN - 1) // BN
    pid = tl.program_id(0)
    split = (pid // (tiles * tiles)).to(tl.int64)
    tile_row = pid // tiles % tiles
    tile_column = pid % tiles
    if tile_row < tile_column:
        return
    left = tile_row * BN + tl.arange(0, BN)
    right = tile_column * BN + tl.arange(0, BN)
    first = split * rows // splits
    last = (split + 1) * rows // splits
    total = tl.zeros((BN, BN), tl.float32)
    for k in range(first, last, BK):
        row = k + tl.arange(0, BK).to(tl.int64)
        live = _live(mask_ptr, row, row < last, tokens, mask_sample, mask_token, FLAT)
        if weight_ptr is not None:
            place = _row_offsets(row, tokens, weight_sample, weight_token, FLAT)
            weight = tl.load(weight_ptr + place, mask=live, other=0.0)
            live = live & (weight != 0.0)
        offsets = _row_offsets(row, tokens, x_sample, x_token, FLAT)
        x = _load(x_ptr, offsets, left, x_column, live, width, WIDEN)
        y = _load(x_ptr, offsets, right, x_column, live, width, WIDEN)
        if weight_ptr is not None:
            x *= weight[:, None]
        total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION)

    left = left.to(tl.int64)[:, None]
    right = right.to(tl.int64)[None, :]
    mask = (left < width) & (right < width)
    out_ptr += split * out_split
    _put(out_ptr + left * out_row + right * out_column, total, mask, ADD)
    if tile_row > tile_column:
        _put(out_ptr + right * out_row + left * out_column, total, mask, ADD)


# an argument that happens to be 1 would otherwise become a compile-time constant without .to()
@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def project_kernel(
    x_ptr,
    mask_ptr,
    out_ptr,
    rows,
    tokens,
    width,
    rank,
    x_sample,
    x_token,
    x_column,
    mask_sample,
    mask_token,
    splits,
    seed_low,
    seed_high,
    SIDE: tl.constexpr,
    FLAT: tl.constexpr,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
):
    """Multiply a block of rows by 64 columns of signs, over one of ``splits`` parts of the width.

    64 rows of 64 signs are a tile of the generator's stream, see `reference.signs`. ``out`` is
    (splits, rows, rank).
    """
    blocks = (rows + BT - 1) // BT
    bands = (rank + 63) // 64
    pid = tl.program_id(0)
    row = (pid % blocks).to(tl.int64) * BT + tl.arange(0, BT)
    band = pid // blocks % bands
    split = (pid // (blocks * bands)).to(tl.int64)
    live = _live(mask_ptr, row, row < rows, tokens, mask_sample, mask_token, FLAT)
    offsets = _row_offsets(row, tokens, x_sample, x_token, FLAT)
    index = tl.arange(0, 128)[:, None]
    j = tl.arange(0, 8)[None, :]
    steps = (width + 63) // 64
    total = tl.zeros((BT, 64), tl.float32)
    for step in range((split * steps // splits).to(tl.int32),
                      ((split + 1) * steps // splits).to(tl.int32)):  # fmt: skip
        start = tl.cast(step, tl.int64) * 4096
        z0, z1, z2, z3 = draw_groups(
            index,
            j,
            0,
            tl.full((), SIDE, tl.uint32),
            start.to(tl.uint32),
            (start >> 32).to(tl.uint32),
            band.to(tl.uint32),
            seed_low.to(tl.uint32, bitcast=True),
            seed_high.to(tl.uint32, bitcast=True),
            False,
            True,
        )
        # (group, column of 256, row of the group) is the order of the stream once turned
        z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
        z = tl.permute(tl.reshape(z, (4, 256, 4)), (0, 2, 1))
        columns = step * 64 + tl.arange(0, 64)
        x = _load(x_ptr, offsets, columns, x_column, live, width, WIDEN)
        total = tl.dot(x, tl.reshape(z, (64, 64)).to(x.dtype), total, input_precision="ieee")
    column = (band * 64 + tl.arange(0, 64)).to(tl.int64)
    place = (split * rows + row)[:, None] * rank + column[None, :]
    tl.store(out_ptr + place, total, mask=(row < rows)[:, None] & (column < rank)[None, :])
