"""Launches of the kernels. No host ever waits for counts: grids are upper bounds."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from shared_kernels.errors import KernelUnavailableError

#: Columns that a program of the assignments' kernel can hold, a float64 sum each.
MOST_COLUMNS: Final = 8192
#: Columns of a program of the sums' kernel; their sums take 16 registers of each thread.
COLS: Final = 1024
#: Bytes that a program asks for before it waits, and the most rows they are taken from.
TILE_BYTES: Final = 16384
MOST_ROWS: Final = 64
#: Float64 numbers of a tile of chunks' sums.
PARTS: Final = 2048
#: Counts of segments that a program looks at at a time.
SEGMENTS: Final = 1024


class Chunks(NamedTuple):
    """How rows are cut.

    Attributes:
        size: Rows of a chunk.
        bound: The most chunks that there can be, whatever the counts.
        depth: Chunks whose sums are added at a time.
        counts: Of counts, those looked at at a time.
    """

    size: int
    bound: int
    depth: int
    counts: int


def chunk_rows(rows: int) -> int:
    """Rows of a chunk: few chunks cost little to write and read back, many fill a GPU."""
    return 128 if rows >= 65536 else 64 if rows >= 4096 else 32


def _power(size: int) -> int:
    return 1 << (max(1, size) - 1).bit_length()


def cut(rows: int, segments: int) -> Chunks:
    """Cut rows of segments whose lengths only the device knows."""
    size = chunk_rows(rows)
    # each segment may begin a chunk that it does not fill, and none is empty
    bound = min(rows, (rows + segments * (size - 1)) // size)
    depth = min(64, max(8, _power(-(-bound // segments))))
    return Chunks(size, bound, depth, max(16, _power(min(segments, SEGMENTS))))


def tile_rows(columns: int, itemsize: int, most: int) -> int:
    """Rows that a program loads at a time."""
    return max(1, min(most, TILE_BYTES // (columns * itemsize)))


def unsupported(*args: Any) -> str | None:
    """Say why the kernels cannot take these arguments, or None: they take all."""
    return None


def assignments_unsupported(output: Tensor, *args: Any) -> str | None:
    """Say why the kernel cannot take these arguments, or None."""
    if output.shape[1] > MOST_COLUMNS:
        return f"a program holds at most {MOST_COLUMNS} columns, got {output.shape[1]}"
    return None


def segment_sums_(
    x: Tensor, counts: Tensor | None, keep: Tensor | None, out: Tensor, kind: str
) -> None:
    """Do what `reference.segment_sums_` defines, in two launches."""
    _sums(x, x, counts, keep, (out, out), kind, pair=False)


def norm_sums_(x: Tensor, y: Tensor, keep: Tensor | None, square: Tensor, absolute: Tensor) -> None:
    """Do what `reference.norm_sums_` defines, in two launches."""
    _sums(x, y, None, keep, (square[None], absolute[None]), "square", pair=True)


def _sums(
    x: Tensor,
    y: Tensor,
    counts: Tensor | None,
    keep: Tensor | None,
    outs: tuple[Tensor, Tensor],
    kind: str,
    *,
    pair: bool,
) -> None:
    from shared_kernels.ops.segments import triton as kernels

    (rows, width), segments = x.shape, outs[0].shape[0]
    if not rows or not width or not segments:
        return
    chunks = cut(rows, segments)
    columns = min(COLS, _power(width))
    both = 2 if pair else 1
    parts = x.new_empty(both, chunks.bound, width, dtype=torch.float64)
    # launch options are not part of the function's signature
    kernel: Any = kernels.sums_kernel
    with torch.cuda.device_of(x):
        kernel[(chunks.bound * -(-width // columns), both)](
            x,
            y,
            x if counts is None else counts,
            x if keep is None else keep,
            parts,
            segments,
            rows,
            width,
            chunks.bound,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            y.stride(1),
            KIND=kind,
            PAIR=pair,
            KEEP=keep is not None,
            WHOLE=counts is None,
            CHUNK=chunks.size,
            ROWS=tile_rows(
                columns, max(x.element_size(), y.element_size()), min(chunks.size, MOST_ROWS)
            ),
            COLS=columns,
            SEGMENTS=chunks.counts,
            num_warps=4,
        )
    _finish(parts, None, counts, outs, None, rows, chunks)


def _finish(
    parts: Tensor,
    numbers: Tensor | None,
    counts: Tensor | None,
    outs: tuple[Tensor, Tensor],
    columns: Tensor | None,
    rows: int,
    chunks: Chunks,
) -> None:
    from shared_kernels.ops.segments import triton as kernels

    both, bound, width = parts.shape
    block = min(PARTS // chunks.depth, _power(width))
    segments = outs[0].shape[0]
    # launch options are not part of the function's signature
    kernel: Any = kernels.finish_kernel
    with torch.cuda.device_of(parts):
        kernel[(segments * -(-width // block), both)](
            parts,
            parts if numbers is None else numbers,
            parts if counts is None else counts,
            *outs,
            parts if columns is None else columns,
            segments,
            rows,
            width,
            bound,
            NUMBERS=numbers is not None,
            WHOLE=counts is None,
            CHUNK=chunks.size,
            DEPTH=chunks.depth,
            COLS=block,
            SEGMENTS=chunks.counts,
            num_warps=4,
        )


def assignment_sums_(
    output: Tensor,
    weight: Tensor,
    share: Tensor,
    counts: Tensor,
    keep: Tensor | None,
    output_sum: Tensor,
    columns: Tensor,
) -> None:
    """Do what `reference.assignment_sums_` defines, in two launches."""
    if (reason := assignments_unsupported(output)) is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.segments import triton as kernels

    (rows, width), segments = output.shape, len(counts)
    if not rows or not width or not segments:
        return
    chunks = cut(rows, segments)
    held = _power(width)
    parts = output.new_empty(1, chunks.bound, width, dtype=torch.float64)
    numbers = output.new_empty(chunks.bound, columns.shape[1], dtype=torch.float64)
    # launch options are not part of the function's signature
    kernel: Any = kernels.assignment_kernel
    with torch.cuda.device_of(output):
        kernel[(chunks.bound,)](
            output,
            weight,
            share,
            counts,
            output if keep is None else keep,
            parts,
            numbers,
            segments,
            rows,
            width,
            output.stride(0),
            output.stride(1),
            KEEP=keep is not None,
            CHUNK=chunks.size,
            # weights and norms of rows in flight take registers of every thread
            ROWS=tile_rows(held, output.element_size(), min(chunks.size, max(4, 4096 // held))),
            COLS=held,
            SEGMENTS=chunks.counts,
            # a thread holds 8 columns, or 16
            num_warps=4 if held <= 1024 else 8 if held <= 4096 else 16,
        )
    _finish(parts, numbers, counts, (output_sum, output_sum), columns, rows, chunks)
