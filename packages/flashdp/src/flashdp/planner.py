"""Which strategy takes a matrix's per-unit norms fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashdp.records import MatrixRecord
    from flashdp.units import Units

__all__ = ["choose", "costs"]

# FLOP/s of matrix products and bytes/s of memory, by kind of device: only their ratio matters.
_RATES = {"cpu": (8e10, 1.5e10), "cuda": (6e14, 4e12)}


def costs(units: int, tokens: int, d: int, p: int, device: str = "cpu") -> dict[str, float]:
    """Estimate the seconds of each strategy for one layer.

    Args:
        units: Units of the batch.
        tokens: Tokens per unit.
        d: Inputs.
        p: Outputs.
        device: ``"cpu"`` or ``"cuda"``.
    """
    flops, width = _RATES[device]
    gemm = 2 * units * tokens * d * p / flops
    return {
        "gram": gemm + 2 * units * tokens**2 * (d + p) / flops + 8 * units * tokens**2 / width,
        "recompute": 2 * gemm,
        "spill": gemm + 20 * units * d * p / width,
    }


def choose(record: MatrixRecord, units: Units) -> str:
    """Choose the cheapest strategy for a record."""
    tokens = units.longest * record.per_row
    kind = record.g.device.type
    estimate = costs(
        len(units), tokens, record.a.shape[1], record.g.shape[1], kind if kind in _RATES else "cuda"
    )
    return min(estimate, key=estimate.__getitem__)
