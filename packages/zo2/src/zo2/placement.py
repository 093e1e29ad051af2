"""Decide where every block lives, in which format, and what that costs on the device."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from shared_kernels.offload import (
    BlockPlan,
    UnitLayout,
    discover_blocks,
    layout_unit,
    memory_limits,
)
from shared_kernels.units import format_bytes
from torch import nn

from zo2.config import OffloadConfig, ZOConfig, parse_bytes

__all__ = ["Placement", "place", "static_bytes"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """The decisions of :func:`place`: units, layouts, which blocks stay, fold window.

    Attributes:
        plan: The blocks.
        layouts: One layout per unit.
        on_device: Units that live on the device, the resident unit included.
        fold_every: K.
        static_bytes: Device bytes of all static buffers: stores, ring, compute buffers.
    """

    plan: BlockPlan
    layouts: list[UnitLayout]
    on_device: set[int]
    fold_every: int
    static_bytes: int


def place(
    model: nn.Module, zo: ZOConfig, offload: OffloadConfig | None, device: torch.device
) -> Placement:
    """Choose stores, and the blocks that stay on the device.

    Args:
        model: The model; parameters may be on the meta device.
        zo: The estimator; q sets the number of resident compute buffers.
        offload: None keeps every block on the device.
        device: Where the model computes.

    Raises:
        ValueError: The GPU budget does not even hold the buffers that streaming needs.
    """
    spec = offload or OffloadConfig()
    plan = discover_blocks(model, _as_list(spec.blocks), spec.resident)
    if zo.arithmetic == "mezo":
        codecs = _mezo_codecs(plan, spec)
    else:
        codecs = _codecs(plan, spec, streamed=offload is not None, device=device)
    layouts = [layout_unit(unit, codecs) for unit in plan.units]
    blocks = range(len(plan.blocks))
    resident = {plan.resident.index}
    if offload is None:
        on_device = {*blocks, *resident}
    else:
        on_device = resident
        if offload.gpu is not None:
            budget = parse_bytes(offload.gpu)
            on_device = resident | _kept(layouts, zo, offload, budget)
    return Placement(
        plan,
        layouts,
        on_device,
        1 if zo.arithmetic == "mezo" else _fold_every(spec, layouts, on_device),
        static_bytes(layouts, on_device, zo, spec.prefetch),
    )


def _as_list(blocks: str | tuple[str, ...] | None) -> str | list[str] | None:
    return list(blocks) if isinstance(blocks, tuple) else blocks


def _codecs(
    plan: BlockPlan, spec: OffloadConfig, *, streamed: bool, device: torch.device
) -> dict[torch.dtype, str]:
    dtypes = {p.dtype for unit in plan.units for p in unit.params if p.trainable}
    if spec.store != "auto":
        if spec.store == "bf16" and dtypes != {torch.bfloat16}:
            raise ValueError(
                f"store='bf16' keeps 8 bits of mantissa, the trained parameters are {dtypes}; "
                "use store='auto', or load the model in bfloat16"
            )
        return dict.fromkeys(dtypes, spec.store)
    need = 4 * sum(p.numel for unit in plan.units for p in unit.params if p.trainable)
    if streamed or device.type != "cuda":
        have = parse_bytes(spec.host) if spec.host is not None else memory_limits().free
    else:
        have = torch.cuda.mem_get_info(device)[0] * 3 // 4
    half = "bf16x2" if need <= have else "bf16"
    if half == "bf16" and torch.bfloat16 in dtypes:
        logger.warning(
            "float32 masters would need %s, %s is free: weights are kept in bfloat16 and rounded "
            "stochastically when updates are folded in",
            format_bytes(need),
            format_bytes(have),
        )
    # float16 values do not fit bfloat16, so they keep a float32 master in either case.
    table = {torch.float32: "fp32", torch.bfloat16: half, torch.float16: "bf16x2"}
    return {dtype: table[dtype] for dtype in dtypes}


def _mezo_codecs(plan: BlockPlan, spec: OffloadConfig) -> dict[torch.dtype, str]:
    own = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    dtypes = {p.dtype for unit in plan.units for p in unit.params if p.trainable}
    if spec.fold_every not in ("auto", 1) or any(
        spec.store not in ("auto", own[dtype]) for dtype in dtypes
    ):
        raise ValueError(
            "arithmetic='mezo' rewrites weights in their own dtype at every step: leave store and "
            f"fold_every at 'auto', got store={spec.store!r}, fold_every={spec.fold_every!r}"
        )
    return {dtype: own[dtype] for dtype in dtypes}


def _fold_every(spec: OffloadConfig, layouts: list[UnitLayout], on_device: set[int]) -> int:
    if spec.fold_every != "auto":
        return spec.fold_every
    # Folding a streamed 16-bit block sends it back, and bf16x2 its lower half both ways; replaying
    # a few updates instead costs less than that, and bf16 rounds less often. Where nothing is
    # streamed, or the forward needs all 32 bits anyway, a block is best folded at once.
    streamed = [layout for k, layout in enumerate(layouts) if k not in on_device]
    short = any(run.codec.main.itemsize == 2 for layout in streamed for run in layout.runs)
    return 8 if short else 1


def static_bytes(
    layouts: list[UnitLayout], on_device: set[int], zo: ZOConfig, prefetch: int
) -> int:
    """Device bytes of every static buffer of the engine."""
    *blocks, resident = layouts
    ring = [layout.nbytes for k, layout in enumerate(layouts) if k not in on_device]
    total = sum(layouts[k].nbytes for k in on_device)
    total += (prefetch + 1) * max(ring, default=0)
    return total + 2 * _compute_bytes(blocks) + 2 * zo.q * _compute_bytes([resident])


def _compute_bytes(layouts: list[UnitLayout]) -> int:
    largest: dict[torch.dtype, int] = {}
    for layout in layouts:
        for run in layout.runs:
            largest[run.compute_dtype] = max(largest.get(run.compute_dtype, 0), run.numel)
    return sum(numel * dtype.itemsize for dtype, numel in largest.items())


def _kept(layouts: list[UnitLayout], zo: ZOConfig, offload: OffloadConfig, budget: int) -> set[int]:
    count = len(layouts) - 1
    # Activations and the allocator's slack are not known here; `zo2 plan --tokens` counts them.
    usable = budget - max(budget // 10, 256 << 20)
    least = static_bytes(layouts, {count}, zo, offload.prefetch)
    if least > usable:
        raise ValueError(
            f"streaming this model needs {format_bytes(least)} of static GPU buffers, the budget "
            f"gpu={offload.gpu!r} leaves {format_bytes(max(usable, 0))} for them; raise it, use "
            "prefetch=1, or store='bf16'"
        )
    keep = 0
    for keep in range(count, -1, -1):
        chosen = _spread(count, keep)
        if static_bytes(layouts, chosen | {count}, zo, offload.prefetch) <= usable:
            break
    return _spread(count, keep)


def _spread(count: int, keep: int) -> set[int]:
    """Choose ``keep`` of ``count`` blocks evenly, so that uploads have work to hide behind."""
    return {(k * count) // keep for k in range(keep)}
