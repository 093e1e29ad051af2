"""MeZO's own arithmetic under streaming (``arithmetic="mezo"``), for parity with published runs.

Every element goes through the operations of the in-place recipe, each rounded to the parameter's
dtype: a = θ + (1·z)·ε, b = a + (-2·z)·ε, c = b + (1·z)·ε, θ ← c - η(g·z + λc), with z from torch's
generator, drawn in model order. The store keeps θ; a visit recomputes a and b, the next step's
visit c and the update. torch's CPU generator cannot jump, so each step begins with a pass over all
parameters that notes the generator's state at every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zo2.materializer import Materializer
from zo2.pending import PendingRecords

if TYPE_CHECKING:
    from shared_kernels.offload import BlockPlan, RunBuffers, WeightStore

__all__ = ["MezoMaterializer"]


@dataclass(frozen=True)
class _Record:
    seed: int
    g: float
    lr: float
    weight_decay: float
    applied: bool


class MezoPending(PendingRecords):
    """Keeps the records' scalars on the host as well, at the price of a synchronisation a step."""

    def __init__(self, run_seed: int, q: int, fold_every: int, device: torch.device) -> None:
        self.records: dict[int, _Record] = {}
        super().__init__(run_seed, q, fold_every, device)

    def append(
        self, g: torch.Tensor, lr: float, weight_decay: float, clip: float | None = None
    ) -> torch.Tensor:
        """As in the base class."""
        step, seed = self.step, self.seed
        ok = super().append(g, lr, weight_decay, clip)
        self.records[step] = _Record(seed, g.item(), lr, weight_decay, bool(ok))
        self.records.pop(step - self._history - 1, None)
        return ok

    def restore(self, records) -> None:
        """As in the base class."""
        super().restore(records)
        for row in records:
            self.records[int(row["step"])] = _Record(
                int(row["seed"]),
                float(row["g"][0]),
                float(row["lr"]),
                float(row["weight_decay"]),
                not int(row["flags"]),
            )


class MezoMaterializer(Materializer):
    """Recomputes MeZO's in-place sequence for whatever unit is at hand."""

    pending: MezoPending

    def __init__(
        self,
        store: WeightStore,
        pending: MezoPending,
        plan: BlockPlan,
        order: list[str],
        *,
        eps: float,
        decay: set[str],
    ) -> None:
        """As :class:`Materializer`, with one fold a step.

        Args:
            store: Homes of all units.
            pending: The records.
            plan: The units.
            order: Canonical names of all trainable parameters, in ``named_parameters`` order.
            eps: Perturbation scale.
            decay: Names that weight decay applies to.
        """
        super().__init__(store, pending, eps=eps, fold_every=1)
        self._decay = decay
        shapes = {p.name: (p.shape, p.dtype) for unit in plan.units for p in unit.params}
        self._order = [(name, *shapes[name]) for name in order]
        self._generator = torch.Generator(store.device)
        self._states: dict[int, dict[str, torch.Tensor]] = {}

    def begin_step(self) -> None:
        """Note the generator's state at every parameter."""
        self._states_of(self.pending.step)

    def _states_of(self, step: int) -> dict[str, torch.Tensor]:
        if step not in self._states:
            record = self.pending.records.get(step)
            self._generator.manual_seed(self.pending.seed if record is None else record.seed)
            states = {}
            for name, shape, dtype in self._order:
                states[name] = self._generator.get_state()
                torch.normal(
                    0.0, 1.0, shape, generator=self._generator, device=self.store.device,
                    dtype=dtype,
                )  # fmt: skip
            self._states[step] = states
            for old in [s for s in self._states if s < step - 1]:
                del self._states[old]
        return self._states[step]

    def _draw(self, step: int, name: str, like: torch.Tensor) -> torch.Tensor:
        self._generator.set_state(self._states_of(step)[name])
        return torch.normal(
            0.0, 1.0, like.shape, generator=self._generator, device=like.device, dtype=like.dtype
        )

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
        layout = self.store.layouts[unit].runs[run]
        outputs = [None if flat is None else layout.views(flat) for flat in (plus, minus)]
        for k, (param, home) in enumerate(
            zip(layout.params, layout.views(streams.main), strict=True)
        ):
            theta = home.clone()
            for step in range(rows.start, rows.stop):
                self._apply(step, param.name, theta)
            if fold:
                home.copy_(theta)
            if direction is not None:
                z = self._draw(self.pending.step, param.name, theta)
                theta.add_(z.clone().mul_(1).mul_(self.eps))
            if outputs[0] is not None:
                outputs[0][k].copy_(theta)
            if outputs[1] is not None:
                theta.add_(z.mul_(-2).mul_(self.eps))
                outputs[1][k].copy_(theta)

    def _apply(self, step: int, name: str, theta: torch.Tensor) -> None:
        """Perturb, restore and update, as the in-place recipe did in that step."""
        record = self.pending.records[step]
        z = self._draw(step, name, theta)
        for scale in (1, -2, 1):
            theta.add_(z.clone().mul_(scale).mul_(self.eps))
        if not record.applied:
            return
        direction = z.mul_(record.g)
        if name in self._decay:
            direction = direction + record.weight_decay * theta
        theta.sub_(record.lr * direction)
