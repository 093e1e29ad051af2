"""Which strategy takes a matrix's per-unit norms fastest, from rates measured on the device."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from shared_kernels.ops.dp import (
    segment_gram_norm,
    segment_mm_clip,
    segment_mm_norm,
    segment_scaled_mm,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from flashdp.records import MatrixRecord
    from flashdp.units import Units

__all__ = ["Rates", "choose", "costs", "measure_rates"]

# Gram matrices are formed in square tiles of so many rows.
_TILE = 128
# The segment kernels of a GPU are fastest where a unit's rows are a multiple of this.
_ALIGNED = 16


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        product: FLOP/s of one product per unit that is written out, without the writing.
        scaled: FLOP/s of the sum of all units' products, each times a factor.
        norm: FLOP/s of products that are squared and thrown away.
        gram: FLOP/s of Gram matrices.
        memory: Bytes/s read and written by simple passes.
    """

    product: float
    scaled: float
    norm: float
    gram: float
    memory: float


# A CPU's ratios hardly differ between machines: every strategy is made of the same products.
_CPU = Rates(8e10, 8e10, 8e10, 8e10, 1.5e10)


@functools.cache
def measure_rates(device: torch.device, dtype: torch.dtype, *, aligned: bool = True) -> Rates:
    """Time the operations on a GPU once, which takes a tenth of a second and 1 GiB.

    Args:
        device: A CUDA device; a CPU has fixed rates.
        dtype: Of activations.
        aligned: Whether units have a multiple of 16 rows.
    """
    if device.type != "cuda":
        return _CPU
    # Large enough that launching does not count.
    units, tokens, width = 8, 2048 if aligned else 2047, 4096
    # From its own generator: the run's random numbers are not touched.
    generator = torch.Generator(device).manual_seed(0)
    a, g = torch.randn(
        2, units * tokens, width, device=device, generator=generator
    ).to(dtype)  # fmt: skip
    cu = torch.arange(units + 1, device=device, dtype=torch.int32) * tokens
    scale = torch.ones(units, device=device)
    out = torch.zeros(width, width, device=device)
    threshold = torch.ones((), device=device)
    multiple = tokens if aligned else 1

    flops = 2 * units * tokens * width * width
    triangle = 2 * units * tokens * (tokens + _TILE) * width
    held = torch.empty(1 << 26, device=device)
    memory = 2 * held.nbytes / _seconds(lambda: held.add_(1))
    passes = _passes(aligned=aligned) * units * width * width / memory
    spill = _seconds(lambda: segment_mm_clip(a, g, cu, threshold, out, equal=True))
    return Rates(
        # What is left of a spill without its passes over memory, however it is split.
        flops / max(spill - passes, spill / 4),
        flops / _seconds(lambda: segment_scaled_mm(a, g, cu, scale, out, row_multiple=multiple)),
        flops / _seconds(lambda: segment_mm_norm(a, g, cu, row_multiple=multiple)),
        triangle / _seconds(lambda: segment_gram_norm(a, g, cu, max_seqlen=tokens)),
        memory,
    )


def _passes(*, aligned: bool) -> float:
    """Bytes that a spill moves for each unit and element of the weight."""
    return 9.0 if aligned else 13.0


def _seconds(fn: Callable[[], object]) -> float:
    fn()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def costs(
    units: int, tokens: int, d: int, p: int, rates: Rates = _CPU, *, aligned: bool = False
) -> dict[str, float]:
    """Estimate the seconds of each strategy for one layer.

    Args:
        units: Units of the batch.
        tokens: Tokens per unit.
        d: Inputs.
        p: Outputs.
        rates: Of the device.
        aligned: Whether units have a multiple of 16 rows.
    """
    flops = 2 * units * tokens * d * p
    tiled = -(-tokens // _TILE) * _TILE + _TILE if rates is not _CPU else 2 * tokens
    gram = units * tokens * tiled * (d + p) / rates.gram
    if rates is _CPU:
        gram += 8 * units * tokens**2 / rates.memory
    return {
        "gram": gram + flops / rates.scaled,
        "recompute": flops / rates.norm + flops / rates.scaled,
        "spill": flops / rates.product + _passes(aligned=aligned) * units * d * p / rates.memory,
    }


def choose(record: MatrixRecord, units: Units) -> str:
    """Choose the cheapest strategy for a record."""
    tokens = units.longest * record.per_row
    aligned = record.per_row % _ALIGNED == 0
    rates = measure_rates(record.g.device, record.g.dtype, aligned=aligned)
    estimate = costs(
        len(units), tokens, record.a.shape[1], record.g.shape[1], rates, aligned=aligned
    )
    return min(estimate, key=estimate.__getitem__)
