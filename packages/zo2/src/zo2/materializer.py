"""The weights a visit computes with: θ + pending updates, ± ε z, out of place.

The store keeps θ as of ``version[i]`` records. A visit replays the records since then in float32,
writes both perturbed copies into static compute buffers with one draw of z, and, when the block
is due, writes the updated θ back. Nothing is restored afterwards because nothing was overwritten:
there is no drift (spec: MeZO perturbs in place and restores).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.ops.zo import Perturbation, Segment, build_tile_table, zo_materialize
from shared_kernels.random import param_uid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared_kernels.offload import (
        OffloadEngine,
        RunBuffers,
        UnitBuffer,
        UnitLayout,
        WeightStore,
    )

    from zo2.pending import PendingRecords

__all__ = ["ExactMaterializer", "Materializer", "Variant"]

Variant = tuple[int, int] | None
"""(direction, sign) of a perturbed copy, or None for the weights as they are."""

Views = list[torch.Tensor]


class _Buffers:
    """Two flat compute buffers per dtype, shared by every unit of one kind."""

    def __init__(self, layouts: Sequence[UnitLayout], device: torch.device) -> None:
        sizes: dict[torch.dtype, int] = {}
        for layout in layouts:
            for run in layout.runs:
                sizes[run.compute_dtype] = max(sizes.get(run.compute_dtype, 0), run.numel)
        self._flat = {
            (dtype, sign): torch.zeros(size, dtype=dtype, device=device)
            for dtype, size in sizes.items()
            for sign in (1, -1)
        }
        self._views: dict[tuple, Views] = {}
        self.nbytes = sum(f.numel() * f.element_size() for f in self._flat.values())

    def flat(self, dtype: torch.dtype, sign: int, numel: int) -> torch.Tensor:
        """The buffer of a sign, cut to a run."""
        return self._flat[dtype, sign][:numel]

    def views(self, layout: UnitLayout, sign: int) -> Views:
        """The parameters of a unit inside the buffer of a sign."""
        key = (layout.signature, sign)
        if key not in self._views:
            self._views[key] = [
                view
                for run in layout.runs
                for view in run.views(self.flat(run.compute_dtype, sign, run.numel))
            ]
        return self._views[key]


class Materializer(ABC):
    """What both arithmetics share: buffers, groups of probes, when a unit folds.

    Attributes:
        nbytes: Device bytes of the compute buffers.
    """

    def __init__(
        self, store: WeightStore, pending: PendingRecords, *, eps: float, fold_every: int
    ) -> None:
        """Allocate the compute buffers.

        Args:
            store: Homes of all units, the resident unit last.
            pending: The records not folded everywhere.
            eps: Perturbation scale.
            fold_every: K; unit i folds at step t when (t + i) is a multiple of K.
        """
        self.store, self.pending = store, pending
        self.eps, self.fold_every = eps, fold_every
        *blocks, resident = store.layouts
        self._blocks = _Buffers(blocks, store.device)
        self._resident = [_Buffers([resident], store.device) for _ in range(pending.q)]
        self._resident_is: list[tuple | None] = [None] * pending.q
        self._needs_lower = [
            any(r.codec.has_lo and r.compute_dtype is not torch.bfloat16 for r in layout.runs)
            for layout in store.layouts
        ]
        self.nbytes = self._blocks.nbytes + sum(b.nbytes for b in self._resident)

    @abstractmethod
    def begin_step(self) -> None:
        """Called before the first visit of a step."""

    @abstractmethod
    def _compute(
        self,
        unit: int,
        run: int,
        streams: RunBuffers,
        rows: slice,
        *,
        direction: int | None = None,
        plus: torch.Tensor | None = None,
        minus: torch.Tensor | None = None,
        fold: bool = False,
        dither_seed: int = 0,
        exact: bool = True,
    ) -> None:
        """Apply records to one run; write perturbed copies, and the result home if ``fold``.

        Args:
            unit: Index of the unit.
            run: Index of the run in the unit's layout.
            streams: The run's stored weights.
            rows: Steps whose records are applied, first to last.
            direction: Direction of the perturbation; None leaves the copy in ``plus`` unperturbed.
            plus: Flat output for the sign +, in the dtype wanted.
            minus: Flat output for the sign -.
            fold: Write the result back to ``streams``.
            dither_seed: Seed of stochastic rounding.
            exact: Whether the lower stream of bf16x2 is there.
        """

    # -- the protocol of OffloadEngine -----------------------------------------------------------

    def parts(self, unit: int, *, training: bool) -> tuple[str, ...]:
        """bf16x2 needs its lower half only where θ is written or must be exact."""
        return ("main",) if training and not self._exact(unit) else ("main", "lo")

    def groups(self, variants: Sequence[Any]) -> list[list[Any]]:
        """Both signs of a direction share one draw; directions follow each other."""
        by_direction: dict[Any, list[Any]] = {}
        for variant in dict.fromkeys(variants):
            by_direction.setdefault(None if variant is None else variant[0], []).append(variant)
        return list(by_direction.values())

    def materialize(
        self, unit: int, buffer: UnitBuffer, group: Sequence[Any], *, training: bool
    ) -> tuple[dict[Any, Views], tuple[str, ...]]:
        """Fill the compute buffers for a direction's signs, folding if the unit is due."""
        changed = self._fill(unit, buffer, self._blocks, group, training=training)
        layout = self.store.layouts[unit]
        views = {v: self._blocks.views(layout, 1 if v is None else v[1]) for v in group}
        return views, changed

    def resident(self, unit: int, buffer: UnitBuffer, variant: Any, *, training: bool) -> Views:
        """As :meth:`materialize`; each direction's pair is made once a step and kept."""
        direction = 0 if variant is None else variant[0]
        buffers = self._resident[direction]
        kind = (self.pending.step, variant is None, self.store.version[unit])
        if self._resident_is[direction] != kind:
            group = [None] if variant is None else [(direction, 1), (direction, -1)]
            self._fill(unit, buffer, buffers, group, training=training)
            version = self.store.version[unit]
            self._resident_is[direction] = (self.pending.step, variant is None, version)
        return buffers.views(self.store.layouts[unit], 1 if variant is None else variant[1])

    def fold(self, unit: int, buffer: UnitBuffer) -> tuple[str, ...]:
        """Write every pending record into θ."""
        rows = slice(self.store.version[unit], self.pending.step)
        self.store.version[unit] = self.pending.step
        return self.replay(unit, buffer, rows, self.pending.flush_seed)

    def replay(
        self, unit: int, buffer: UnitBuffer, rows: slice, dither_seed: int
    ) -> tuple[str, ...]:
        """Apply the records of ``rows`` to a unit's stored weights; returns the streams changed."""
        runs = range(len(self.store.layouts[unit].runs))
        if rows.start == rows.stop or not runs:
            return ()
        for k in runs:
            self._compute(unit, k, buffer.runs[k], rows, fold=True, dither_seed=dither_seed)
        return self._streams(unit)

    def read(
        self, engine: OffloadEngine, unit: int, dtype: torch.dtype | None
    ) -> dict[str, torch.Tensor]:
        """Copy a unit's current weights to the host, by canonical name; the store is untouched.

        Args:
            engine: The engine that can bring the unit to the device.
            unit: Index of the unit.
            dtype: Default: each parameter's own, rounded to nearest.
        """
        layout = self.store.layouts[unit]
        rows = slice(self.store.version[unit], self.pending.step)
        out: dict[str, torch.Tensor] = {}
        with engine.borrow(unit) as buffer:
            for k, run in enumerate(layout.runs):
                flat = torch.zeros(
                    run.numel, dtype=dtype or run.compute_dtype, device=self.store.device
                )
                self._compute(unit, k, buffer.runs[k], rows, plus=flat)
                for param, view in zip(run.params, run.views(flat), strict=True):
                    out[param.name] = view.to("cpu", copy=True)
            for param, view in zip(layout.frozen, buffer.frozen, strict=True):
                out[param.name] = view.to("cpu", dtype or param.dtype, copy=True)
        return out

    def forget(self) -> None:
        """Drop what was computed from stores that have been overwritten."""
        self._resident_is = [None] * self.pending.q

    # -- the arithmetic --------------------------------------------------------------------------

    def _due(self, unit: int) -> bool:
        return (self.pending.step + unit) % self.fold_every == 0

    def _exact(self, unit: int) -> bool:
        """Whether a training visit reads the lower half of bf16x2 too.

        A bfloat16 forward computes with the upper half and the pending updates, at most one ulp
        off, until the unit is due; a forward of higher precision needs both halves every time.
        """
        return self._due(unit) or self._needs_lower[unit]

    def _streams(self, unit: int) -> tuple[str, ...]:
        return ("main", "lo") if self.store.layouts[unit].lo_nbytes else ("main",)

    def _fill(
        self,
        unit: int,
        buffer: UnitBuffer,
        target: _Buffers,
        group: Sequence[Any],
        *,
        training: bool,
    ) -> tuple[str, ...]:
        exact = not training or self._exact(unit)
        fold = training and self._due(unit) and self.store.version[unit] < self.pending.step
        rows = slice(self.store.version[unit], self.pending.step)
        signs = {1 if v is None else v[1] for v in group}
        for k, run in enumerate(self.store.layouts[unit].runs):
            self._compute(
                unit,
                k,
                buffer.runs[k],
                rows,
                direction=None if group[0] is None else group[0][0],
                plus=target.flat(run.compute_dtype, 1, run.numel) if 1 in signs else None,
                minus=target.flat(run.compute_dtype, -1, run.numel) if -1 in signs else None,
                fold=fold,
                dither_seed=self.pending.seed,
                exact=exact,
            )
        if fold:
            self.store.version[unit] = self.pending.step
            return self._streams(unit)
        return ()


class ExactMaterializer(Materializer):
    """Counter-based noise, out of place, one fused kernel (``arithmetic="exact"``)."""

    def __init__(
        self,
        store: WeightStore,
        pending: PendingRecords,
        *,
        eps: float,
        fold_every: int,
        dist: str,
        decay: set[str],
    ) -> None:
        """As :class:`Materializer`.

        Args:
            store: Homes of all units.
            pending: The records not folded everywhere.
            eps: Perturbation scale.
            fold_every: K.
            dist: "gaussian" or "rademacher".
            decay: Canonical names of the parameters that weight decay applies to.
        """
        super().__init__(store, pending, eps=eps, fold_every=fold_every)
        self.dist = dist
        self._tiles = [
            [
                build_tile_table(
                    [Segment(param_uid(p.name), p.numel, p.name in decay) for p in run.params],
                    device=store.device,
                )
                for run in layout.runs
            ]
            for layout in store.layouts
        ]

    def begin_step(self) -> None:
        """Nothing to prepare: the noise of any element follows from its index."""

    def _compute(
        self,
        unit: int,
        run: int,
        streams: RunBuffers,
        rows: slice,
        *,
        direction: int | None = None,
        plus: torch.Tensor | None = None,
        minus: torch.Tensor | None = None,
        fold: bool = False,
        dither_seed: int = 0,
        exact: bool = True,
    ) -> None:
        keys, coefs = self.pending.rows(rows)
        perturb = None
        if direction is not None:
            perturb = Perturbation(self.pending.seed, direction, self.eps)
        lossless = self.store.layouts[unit].runs[run].codec.exact
        zo_materialize(
            streams.main,
            self._tiles[unit][run],
            keys,
            coefs,
            perturb=perturb,
            plus=plus,
            minus=minus,
            fold=fold,
            rounding="nearest" if lossless else "stochastic",
            dither_seed=dither_seed,
            dist=self.dist,
            lo=streams.lo if exact else None,
        )
