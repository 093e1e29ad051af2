"""Launches of the divergence kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch

from shared_kernels._library import interpreting
from shared_kernels.errors import KernelUnavailableError

if TYPE_CHECKING:
    from torch import Tensor

#: Rows, tokens and width of a tile, and tiles of a part. Constants, and no function of the number
#: of rows, so that what a row gives does not depend on the rows beside it.
TILE: Final = (128, 128, 64)
TILES: Final = 4
SMALL_TILE: Final = (16, 32, 16)
STAGES: Final = 3
WARPS: Final = 8
#: Bytes of the split head that exist at a time.
CHUNK_BYTES: Final = 1 << 29


def unsupported(delta: Tensor, *args: Any) -> str | None:
    """Say why the kernels cannot take these arguments, or None."""
    return "float64 has no kernel" if delta.dtype == torch.float64 else None


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def kl_from_delta(delta: Tensor, weight: Tensor, law: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Compute what `reference.kl_from_delta` defines, the head chunk by chunk."""
    if (reason := unsupported(delta)) is not None:
        raise KernelUnavailableError(f"impl='triton' cannot run: {reason}; use impl='reference'")
    from shared_kernels.ops.patching.kl import triton as kernels

    variants, examples, width = delta.shape
    vocabulary, rows = weight.shape[0], variants * examples
    if not rows or not weight.numel():
        return delta.new_zeros(variants, examples)
    m, n, k = SMALL_TILE if interpreting() else TILE
    part, padded, padded_rows = n * TILES, _up(width, k), _up(rows, m)
    chunk = min(max(part, CHUNK_BYTES // (4 * padded) // part * part), _up(vocabulary, part))
    parts = -(-vocabulary // part)
    law = torch.nn.functional.pad(law, (0, parts * part - vocabulary))
    centre = mean.mean(0)
    low, high = weight.aminmax()
    size = torch.maximum(low.abs(), high.abs()).float() + centre.abs().max()
    split_rows = delta.new_empty(2, padded_rows, padded, dtype=torch.float16)
    words = delta.new_empty(2, chunk, padded, dtype=torch.float16)
    factor, bias = delta.new_empty(2, padded_rows)
    state = delta.new_empty(parts, 3, rows)
    sums = delta.new_empty(3, rows)
    # launch options are not part of the functions' signatures
    split_row: Any = kernels.rows_kernel
    split_words: Any = kernels.words_kernel
    divergence: Any = kernels.divergence_kernel
    merge: Any = kernels.merge_kernel
    columns = min(1024, 1 << (padded - 1).bit_length())
    with torch.cuda.device_of(delta):
        split_row[(padded_rows,)](
            delta, mean, centre, split_rows, factor, bias, rows, variants, width, padded,
            padded_rows * padded, delta.stride(0), delta.stride(1), scale, COLS=columns,
        )  # fmt: skip
        for first in range(0, vocabulary, chunk):
            there = min(chunk, _up(vocabulary - first, part))
            split_words[(there // 64, -(-padded // 64))](
                weight, centre, size, words, first, vocabulary, width, padded, chunk * padded,
                ROWS=64, COLS=64,
            )  # fmt: skip
            divergence[(padded_rows // m, there // part)](
                split_rows, words, law, factor, bias, size, state, rows, variants, first,
                vocabulary, law.stride(0), padded, padded_rows * padded, chunk * padded,
                TILES=TILES, M=m, N=n, K=k, num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
        merge[(-(-rows // 64),)](state, sums, rows, parts, ROWS=64, num_warps=2)
    total, peak, far = sums.double()
    found = torch.logaddexp(total.log1p(), peak + (far.log() - 60 * math.log(2)))
    return found.float().view(examples, variants).T.contiguous()
