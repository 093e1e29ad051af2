"""Predict a run before it starts: which bound holds, how long a step takes, what memory it needs.

Static buffers are counted by the code that allocates them; activations are found by running the
model on shapes. Rates of the machine are measured, or given.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from shared_kernels.offload import Bandwidth, measure_bandwidth, memory_limits
from shared_kernels.units import format_bytes

from zo2._trace import ForwardTrace, trace_forward
from zo2.config import OffloadConfig, ZOConfig, parse_bytes
from zo2.placement import Placement, place

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

__all__ = ["FIRST_ORDER_BYTES", "Plan", "plan"]

FIRST_ORDER_BYTES = {
    "AdamW, mixed precision": 16,
    "AdamW, 8-bit states": 6,
    "SGD, 16-bit": 4,
    "LoRA, frozen 16-bit base": 2,
}
"""GPU bytes per parameter of first-order training, activations not counted."""

# cuBLAS keeps a workspace for every thread that multiplies, and each probe has its thread.
_CUBLAS_WORKSPACE = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The prediction. Times in seconds, sizes in bytes; "block" means the largest one.

    Attributes:
        regime: What bounds the step: ``"resident"`` (nothing is streamed), ``"compute"`` or
            ``"transfer"``.
        t_step: Time of a step.
        t_h2d: Upload of a block, averaged over fold and other steps.
        t_d2h: Write-back of a block, averaged likewise.
        t_comp: Computation on a block: forwards, noise, memory passes.
        t_draw: One draw of a block's noise.
        t_star: Tokens per forward above which the transfer is hidden.
        tokens: Tokens per forward the plan is for.
        gpu_bytes: Peak GPU memory: ``static_bytes`` + ``activation_bytes`` + ``workspace_bytes``.
        static_bytes: Stores, ring and compute buffers on the GPU.
        activation_bytes: Peak of what forwards hold in lock-step, logits and loss included.
        workspace_bytes: Kept by cuBLAS.
        gpu_budget: The budget asked for.
        host_bytes: Host memory for the weights.
        host_free: Host memory that can be had (machine and cgroup).
        host_limit: The limit asked for.
        memlock: Bytes that may be page-locked, None where there is no limit.
        store: Codec by compute dtype.
        fold_every: Steps between write-backs of a block.
        best_fold_every: The window with the shortest predicted step at these tokens. A step's
            losses depend on it by roundings, so the engine never changes it by itself: give it
            to `OffloadConfig`. Equal to ``fold_every`` where folding rounds, or moves nothing.
        n_blocks: Blocks.
        n_resident_blocks: Blocks that stay on the GPU.
        n_parameters: Parameters in all.
        n_trainable: Parameters that are trained.
        activations: ``"traced"``, or ``"estimated"`` if the model cannot run on shapes alone.
        first_order: GPU bytes of first-order training, by optimizer.
        bandwidth: Rates the times were computed with.
    """

    regime: Literal["resident", "compute", "transfer"]
    t_step: float
    t_h2d: float
    t_d2h: float
    t_comp: float
    t_draw: float
    t_star: float
    tokens: int
    gpu_bytes: int
    static_bytes: int
    activation_bytes: int
    workspace_bytes: int
    gpu_budget: int | None
    host_bytes: int
    host_free: int
    host_limit: int | None
    memlock: int | None
    store: dict[str, str]
    fold_every: int
    best_fold_every: int
    n_blocks: int
    n_resident_blocks: int
    n_parameters: int
    n_trainable: int
    activations: Literal["traced", "estimated"]
    first_order: dict[str, int]
    bandwidth: Bandwidth

    @property
    def fits_gpu(self) -> bool:
        """Whether the peak stays within the budget (True without one)."""
        return self.gpu_budget is None or self.gpu_bytes <= self.gpu_budget

    @property
    def fits_host(self) -> bool:
        """Whether the weights fit the host memory that can be had, and the limit asked for."""
        limit = self.host_free if self.host_limit is None else min(self.host_free, self.host_limit)
        return self.host_bytes <= limit

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **dataclasses.asdict(self),
            "fits_gpu": self.fits_gpu,
            "fits_host": self.fits_host,
        }

    def table(self) -> Table:
        """As a rich table."""
        from rich.table import Table

        table = Table("", "", show_header=False, title="zo2 plan", title_justify="left")
        for name, value in self._rows():
            table.add_row(name, value)
        return table

    def _rows(self) -> list[tuple[str, str]]:
        size, ms = format_bytes, lambda t: f"{t * 1e3:.2f} ms"
        budget = "" if self.gpu_budget is None else f" of {size(self.gpu_budget)}"
        host = f"need {size(self.host_bytes)}, have {size(self.host_free)}"
        if self.host_limit is not None:
            host += f", limit {size(self.host_limit)}"
        lock = "no limit" if self.memlock is None else size(self.memlock)
        star = "any" if self.t_star == 0 else f"{self.t_star:,.0f} tokens"
        bound = {
            "resident": "everything stays on the GPU",
            "compute": "computation (transfers are hidden)",
            "transfer": f"transfers; hidden from {star} per forward, more directions are free",
        }
        kept = f"{self.n_resident_blocks} of {self.n_blocks} blocks resident"
        return [
            ("parameters", f"{self.n_parameters:,} ({self.n_trainable:,} trained)"),
            ("step", f"{self.t_step:.3f} s at {self.tokens:,} tokens per forward"),
            ("bound by", bound[self.regime]),
            (
                "one block",
                f"upload {ms(self.t_h2d)}, write-back {ms(self.t_d2h)}, compute {ms(self.t_comp)}, "
                f"one draw {ms(self.t_draw)}",
            ),
            (
                "GPU memory",
                f"{size(self.gpu_bytes)}{budget}{'' if self.fits_gpu else '  DOES NOT FIT'}",
            ),
            ("  static buffers", f"{size(self.static_bytes)}, {kept}"),
            ("  activations", f"{size(self.activation_bytes)} ({self.activations})"),
            ("  workspaces", size(self.workspace_bytes)),
            ("host memory", host + ("" if self.fits_host else "  DOES NOT FIT")),
            ("page-locking limit", lock),
            (
                "store",
                ", ".join(f"{d} as {s}" for d, s in self.store.items())
                + f", folded every {self.fold_every} steps"
                + (
                    f" (faster here: fold_every={self.best_fold_every})"
                    if self.best_fold_every != self.fold_every
                    else ""
                ),
            ),
            *((f"instead: {name}", f"{size(n)} of GPU") for name, n in self.first_order.items()),
        ]


def plan(
    config_or_model: Any,
    *,
    tokens: int,
    batch_size: int = 1,
    gpu: str | int | None = None,
    host: str | int | None = None,
    store: str = "auto",
    offload: OffloadConfig | None = None,
    zo: ZOConfig | None = None,
    dtype: torch.dtype | str = "auto",
    bandwidth: Bandwidth | dict[str, float] | Literal["measure"] = "measure",
    device: torch.device | str | None = None,
) -> Plan:
    """Predict time and memory of a run; loads no weights.

    Args:
        config_or_model: A model folder or name, a transformers config, or a module (on any
            device, also meta).
        tokens: Tokens of one batch (sequence length times ``batch_size``).
        batch_size: Sequences in the batch.
        gpu: GPU budget; ``None`` streams every block.
        host: Host limit.
        store: As in `zo2.OffloadConfig`.
        offload: All placement options at once, instead of the three above.
        zo: The estimator.
        dtype: Compute dtype; ``"auto"`` takes the config's.
        bandwidth: Rates of the machine, or ``"measure"`` to measure them here.
        device: Where the model will compute; default: CUDA if there.

    Raises:
        ValueError: ``tokens`` is no positive multiple of ``batch_size``, or the GPU budget does
            not hold even the buffers that streaming needs.
    """
    if tokens < 1 or batch_size < 1 or tokens % batch_size:
        raise ValueError(
            f"expected tokens to be a positive multiple of batch_size, got tokens={tokens} and "
            f"batch_size={batch_size}"
        )
    zo = zo or ZOConfig()
    offload = offload or OffloadConfig.from_dict({"gpu": gpu, "host": host, "store": store})
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _meta_model(config_or_model, dtype)
    placement = place(model, zo, offload, device)
    if bandwidth == "measure":
        bandwidth = measure_bandwidth(device, dist=zo.dist)
    elif isinstance(bandwidth, dict):
        bandwidth = Bandwidth(**bandwidth)
    micro = min(zo.micro_batch_size or batch_size, batch_size)
    parts = -(-batch_size // micro)
    probes = 2 * zo.q * parts
    length = tokens // batch_size
    trace, how = _trace(model, placement, micro, length)

    def times(every: int) -> dict[str, Any]:
        return _times(placement, trace, zo, probes, bandwidth, micro * length, every)

    limits = memory_limits()
    buffers = sum(b.nbytes for b in model.buffers())
    activations = trace.peak(probes) + 16 * tokens
    static = placement.static_bytes + buffers
    workspace = probes * _CUBLAS_WORKSPACE if device.type == "cuda" else 0
    layouts = placement.layouts
    n_parameters = sum(p.numel for layout in layouts for p in layout.unit.params)
    return Plan(
        **times(placement.fold_every),
        tokens=micro * length,
        gpu_bytes=static + activations + workspace,
        static_bytes=static,
        activation_bytes=activations,
        workspace_bytes=workspace,
        gpu_budget=None if offload.gpu is None else parse_bytes(offload.gpu),
        host_bytes=sum(layouts[k].nbytes for k in _streamed(placement)),
        host_free=limits.free,
        host_limit=None if offload.host is None else parse_bytes(offload.host),
        memlock=limits.memlock,
        store={
            str(run.compute_dtype).removeprefix("torch."): run.codec.name
            for layout in layouts
            for run in layout.runs
        },
        fold_every=placement.fold_every,
        best_fold_every=min(_windows(placement), key=lambda k: times(k)["t_step"]),
        n_blocks=len(placement.plan.blocks),
        n_resident_blocks=len(placement.on_device) - 1,
        n_parameters=n_parameters,
        n_trainable=sum(p.numel for layout in layouts for run in layout.runs for p in run.params),
        activations=how,
        first_order={name: n * n_parameters for name, n in FIRST_ORDER_BYTES.items()},
        bandwidth=bandwidth,
    )


def _streamed(placement: Placement) -> list[int]:
    return [k for k in range(len(placement.layouts)) if k not in placement.on_device]


def _windows(placement: Placement) -> list[int]:
    """Fold windows to choose from, the one in force first: equals keep it."""
    runs = [run for k in _streamed(placement) for run in placement.layouts[k].runs]
    if any(run.codec.has_lo for run in runs) and all(run.codec.exact for run in runs):
        return [placement.fold_every, *(1 << k for k in range(7))]
    return [placement.fold_every]


def _meta_model(what: Any, dtype: torch.dtype | str) -> nn.Module:
    if isinstance(what, torch.nn.Module):
        return what
    import transformers

    config = what
    if isinstance(what, (str, os.PathLike, Path)):
        config = transformers.AutoConfig.from_pretrained(what)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _trace(
    model: nn.Module, placement: Placement, batch: int, length: int
) -> tuple[ForwardTrace, Literal["traced", "estimated"]]:
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if getattr(getattr(model, "config", None), "use_cache", None) is not None:
        inputs["use_cache"] = False
    blocks = [unit.module for unit in placement.plan.blocks if unit.module is not None]
    try:
        return trace_forward(model, blocks, inputs), "traced"
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return _guess(placement, batch * length), "estimated"


def _guess(placement: Placement, tokens: int) -> ForwardTrace:
    """Stand-in for a model whose control flow needs values: widths read off its matrices."""
    units = placement.plan.units
    widths = [min(p.shape) for u in units for p in u.params if len(p.shape) == 2] or [1]
    widest = [max(p.shape) for u in units[:-1] for p in u.params if len(p.shape) == 2] or [1]
    vocabulary = max([max(p.shape) for p in units[-1].params if len(p.shape) == 2] or [1])
    itemsize = max([p.dtype.itemsize for u in units for p in u.params] or [4])
    hidden = tokens * int(statistics.median(widths)) * itemsize
    inside = 2 * hidden + 3 * tokens * max(widest) * itemsize
    head = 2 * hidden + tokens * vocabulary * (itemsize + 8)
    count = len(units) - 1
    flops = 2.0 * tokens * sum(p.numel for u in units for p in u.params)
    return ForwardTrace(flops, (2 * hidden,) * count, (*([inside] * count), max(inside, head)))


def _times(
    placement: Placement,
    trace: ForwardTrace,
    zo: ZOConfig,
    probes: int,
    rates: Bandwidth,
    tokens: int,
    every: int,
) -> dict[str, Any]:
    layouts = placement.layouts
    streamed = _streamed(placement)
    sizes = [sum(p.numel for p in layout.unit.params) for layout in layouts]
    drawn = [sum(run.numel for run in layout.runs) for layout in layouts]
    largest = max(range(len(layouts) - 1), key=lambda k: layouts[k].nbytes)
    # A visit replays q rows for each of on average (K + 1) / 2 pending steps, then perturbs, for
    # each direction; it reads the store and writes two copies.
    draws = zo.q * (1 + zo.q * (every + 1) / 2)

    def up(k: int) -> float:
        return (layouts[k].main_nbytes + layouts[k].lo_nbytes / every) / rates.h2d

    def down(k: int) -> float:
        changes = any(layouts[k].runs)
        return layouts[k].nbytes / every / rates.d2h if changes else 0.0

    def passes(k: int) -> float:
        copies = sum(2 * run.numel * run.compute_dtype.itemsize for run in layouts[k].runs)
        noise = drawn[k] * draws / rates.rng
        return max(noise, zo.q * (layouts[k].main_nbytes + copies) / rates.d2d)

    matmul = probes * trace.flops / rates.gemm
    share = sizes[largest] / max(1, sum(sizes))
    compute = matmul + sum(passes(k) for k in range(len(layouts)))
    uploads, downloads = sum(map(up, streamed)), sum(map(down, streamed))
    # Only what goes both ways at once shares the link.
    common = 2 * min(uploads * rates.h2d, downloads * rates.d2h)
    alone = max(0.0, uploads - downloads * rates.d2h / rates.h2d)
    t_step = max(compute, uploads, downloads, common / rates.duplex + alone)
    regime = "resident" if not streamed else "compute" if compute >= t_step else "transfer"
    flops_per_token = trace.flops * share / tokens
    waiting = up(largest) - passes(largest)
    return {
        "regime": regime,
        "t_step": t_step,
        "t_h2d": up(largest) if streamed else 0.0,
        "t_d2h": down(largest) if streamed else 0.0,
        "t_comp": matmul * share + passes(largest),
        "t_draw": drawn[largest] / rates.rng,
        "t_star": max(0.0, waiting * rates.gemm / (probes * flops_per_token)) if streamed else 0.0,
    }
