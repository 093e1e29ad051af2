"""Sums of consecutive rows in Triton: those of chunks of rows, then those of a segment's chunks."""

import triton
import triton.language as tl


@triton.jit
def _chunk_rows(
    counts_ptr,
    segments,
    rows,
    chunk,
    WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Return a chunk's first row and the one after its last; where there is none, no rows.

    Chunks are numbered through all segments; a segment has ``ceil(count / CHUNK)`` of them. WHOLE
    makes all rows one segment.
    """
    if WHOLE:
        begin = chunk * CHUNK
        end = begin + CHUNK
    else:
        # rows and chunks of the segments before the chunk's, rows of its own, chunks looked at
        begin = tl.zeros((), tl.int64)
        before = tl.zeros((), tl.int64)
        size = tl.zeros((), tl.int64)
        seen = tl.zeros((), tl.int64)
        for base in range(0, segments, SEGMENTS):
            index = base + tl.arange(0, SEGMENTS)
            count = tl.load(counts_ptr + index, mask=index < segments, other=0)
            chunks = (count + (CHUNK - 1)) // CHUNK
            last = seen + tl.cumsum(chunks, 0)
            passed = last <= chunk
            begin += tl.sum(tl.where(passed, count, 0), 0)
            before += tl.sum(tl.where(passed, chunks, 0), 0)
            here = (last > chunk) & (last - chunks <= chunk)
            size += tl.sum(tl.where(here, count, 0), 0)
            seen += tl.sum(chunks, 0)
        first = (chunk - before) * CHUNK
        end = begin + tl.minimum(size, first + CHUNK)
        begin += first
    # counts that do not add up to the rows must not lead outside
    return tl.maximum(begin, 0), tl.minimum(end, rows)


@triton.jit
def _live(row, end, keep_ptr, KEEP: tl.constexpr):
    """Return which rows of a chunk count."""
    live = row < end
    if KEEP:
        live = live & (tl.load(keep_ptr + row, mask=live, other=0) != 0)
    return live


@triton.jit
def _load(x_ptr, row, column, row_stride, column_stride, live, inside):
    """Load a tile, 0 where nothing counts."""
    return tl.load(
        x_ptr + row[:, None] * row_stride + column[None, :] * column_stride,
        mask=live[:, None] & inside[None, :],
        other=0.0,
    )


@triton.jit
def _wide(x):
    """Return float32, or float64 as it is."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def _column_sums(
    x_ptr,
    keep_ptr,
    begin,
    end,
    column,
    inside,
    row_stride,
    column_stride,
    KIND: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sum a chunk over COLS columns."""
    total = tl.zeros((COLS,), tl.float64)
    for low in range(begin, end, ROWS):
        row = low + tl.arange(0, ROWS).to(tl.int64)
        live = _live(row, end, keep_ptr, KEEP)
        x = _wide(_load(x_ptr, row, column, row_stride, column_stride, live, inside))
        if KIND == "abs":
            x = tl.abs(x)
        if KIND == "square":
            x = x * x
        total += tl.sum(x.to(tl.float64), 0)
    return total


@triton.jit
def sums_kernel(
    x_ptr,
    y_ptr,
    counts_ptr,
    keep_ptr,
    parts_ptr,
    segments,
    rows,
    width,
    bound,
    x_row,
    x_column,
    y_row,
    y_column,
    KIND: tl.constexpr,
    PAIR: tl.constexpr,
    KEEP: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Sum one chunk over COLS columns, into ``parts (1 or 2, bound, width)``.

    With PAIR the second row of the grid takes absolute values of y.
    """
    blocks = tl.cdiv(width, COLS)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    column = ((tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)).to(tl.int64)
    inside = column < width
    begin, end = _chunk_rows(counts_ptr, segments, rows, chunk, WHOLE, CHUNK, SEGMENTS)
    which = tl.program_id(1).to(tl.int64)
    if PAIR:
        if which == 0:
            total = _column_sums(
                x_ptr, keep_ptr, begin, end, column, inside, x_row, x_column,
                KIND, KEEP, ROWS, COLS,
            )  # fmt: skip
        else:
            total = _column_sums(
                y_ptr, keep_ptr, begin, end, column, inside, y_row, y_column,
                "abs", KEEP, ROWS, COLS,
            )  # fmt: skip
    else:
        total = _column_sums(
            x_ptr, keep_ptr, begin, end, column, inside, x_row, x_column, KIND, KEEP, ROWS, COLS
        )
    place = (which * bound + chunk) * width + column
    tl.store(parts_ptr + place, total, mask=column < tl.where(begin < end, width, 0))


@triton.jit
def assignment_kernel(
    x_ptr,
    weight_ptr,
    share_ptr,
    counts_ptr,
    keep_ptr,
    parts_ptr,
    numbers_ptr,
    segments,
    rows,
    width,
    x_row,
    x_column,
    KEEP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Sum one chunk over all columns, into ``parts (bound, width)``, and what belongs to its rows.

    ``numbers (bound, 6)`` takes the rows that count, the sums of weights, shares, norms and
    weights times norms, and the largest norm.
    """
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLS).to(tl.int64)
    inside = column < width
    begin, end = _chunk_rows(counts_ptr, segments, rows, chunk, False, CHUNK, SEGMENTS)
    member = begin + tl.arange(0, CHUNK).to(tl.int64)
    counted = _live(member, end, keep_ptr, KEEP)
    number = tl.sum(counted.to(tl.int32), 0).to(tl.float64)
    weights = tl.sum(tl.load(weight_ptr + member, mask=counted, other=0.0).to(tl.float64), 0)
    shares = tl.sum(tl.load(share_ptr + member, mask=counted, other=0.0).to(tl.float64), 0)
    total = tl.zeros((COLS,), tl.float64)
    norms = tl.zeros((), tl.float64)
    weighted = tl.zeros((), tl.float64)
    peak = tl.zeros((), tl.float64)
    row = begin + tl.arange(0, ROWS).to(tl.int64)
    live = _live(row, end, keep_ptr, KEEP)
    coming = _load(x_ptr, row, column, x_row, x_column, live, inside)
    for low in range(begin, end, ROWS):
        w = tl.load(weight_ptr + row, mask=live, other=0.0).to(tl.float64)
        x = _wide(coming)
        # the next rows are on their way while these are summed
        row = low + ROWS + tl.arange(0, ROWS).to(tl.int64)
        live = _live(row, end, keep_ptr, KEEP)
        coming = _load(x_ptr, row, column, x_row, x_column, live, inside)
        square = tl.sum(x * x, 1)
        norm = tl.sqrt(square) if square.dtype == tl.float64 else tl.sqrt_rn(square)
        norm = norm.to(tl.float64)
        total += tl.sum(x.to(tl.float64), 0)
        norms += tl.sum(norm, 0)
        weighted += tl.sum(w * norm, 0)
        peak = tl.maximum(peak, tl.max(norm, 0))
    # a maximum hides what is not a number, a sum does not
    peak = tl.where(norms == norms, peak, norms)
    there = begin < end
    tl.store(parts_ptr + chunk * width + column, total, mask=column < tl.where(there, width, 0))
    numbers_ptr += chunk * 6
    tl.store(numbers_ptr, number, mask=there)
    tl.store(numbers_ptr + 1, weights, mask=there)
    tl.store(numbers_ptr + 2, shares, mask=there)
    tl.store(numbers_ptr + 3, norms, mask=there)
    tl.store(numbers_ptr + 4, weighted, mask=there)
    tl.store(numbers_ptr + 5, peak, mask=there)


@triton.jit
def finish_kernel(
    parts_ptr,
    numbers_ptr,
    counts_ptr,
    out_ptr,
    other_ptr,
    columns_ptr,
    segments,
    rows,
    width,
    bound,
    NUMBERS: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Add a segment's chunks up over COLS columns, DEPTH at a time, and add them to the output.

    The second row of the grid does so for the second part and output.
    """
    blocks = tl.cdiv(width, COLS)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    column = (block * COLS + tl.arange(0, COLS)).to(tl.int64)
    inside = column < width
    first = tl.zeros((), tl.int64)
    number = tl.zeros((), tl.int64)
    if WHOLE:
        number += tl.cdiv(rows, CHUNK)
    else:
        for base in range(0, segments, SEGMENTS):
            index = base + tl.arange(0, SEGMENTS)
            count = tl.load(counts_ptr + index, mask=index < segments, other=0)
            chunks = (count + (CHUNK - 1)) // CHUNK
            first += tl.sum(tl.where(index < segment, chunks, 0), 0)
            number += tl.sum(tl.where(index == segment, chunks, 0), 0)
    # counts that do not add up to the rows must not lead outside
    last = tl.minimum(first + number, bound)
    first = tl.maximum(first, 0)
    which = tl.program_id(1).to(tl.int64)
    if which == 1:
        out_ptr = other_ptr
    total = tl.zeros((DEPTH, COLS), tl.float64)
    for low in range(first, last, DEPTH):
        chunk = low + tl.arange(0, DEPTH).to(tl.int64)
        place = (which * bound + chunk)[:, None] * width + column[None, :]
        there = (chunk < last)[:, None] & inside[None, :]
        total += tl.load(parts_ptr + place, mask=there, other=0.0)
    place = segment * width + column
    held = tl.load(out_ptr + place, mask=inside, other=0.0)
    tl.store(out_ptr + place, held + tl.sum(total, 0), mask=inside)
    if NUMBERS:  # noqa: SIM102
        if block == 0:
            field = tl.arange(0, 8)
            known = field < 6
            numbers = tl.zeros((DEPTH, 8), tl.float64)
            peaks = tl.zeros((DEPTH, 8), tl.float64)
            for low in range(first, last, DEPTH):
                some = low + tl.arange(0, DEPTH).to(tl.int64)
                found = tl.load(
                    numbers_ptr + some[:, None] * 6 + field[None, :],
                    mask=(some < last)[:, None] & known[None, :],
                    other=0.0,
                )
                numbers += found
                peaks = tl.maximum(peaks, found)
            sums = tl.sum(numbers, 0)
            # a maximum hides what is not a number, a sum does not
            peak = tl.where(sums == sums, tl.max(peaks, 0), sums)
            columns_ptr += segment * 6
            old = tl.load(columns_ptr + field, mask=known, other=0.0)
            peak = tl.where((peak > old) | (peak != peak), peak, old)
            tl.store(columns_ptr + field, tl.where(field < 5, old + sums, peak), mask=known)
