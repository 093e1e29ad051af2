"""Run a model whose blocks live elsewhere: a visit loads a block once for all who wait for it."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shared_kernels.offload.probes import Probe, RngState, ThreadState, Worker
from shared_kernels.offload.store import DeviceRing, UnitBuffer, WeightStore
from shared_kernels.offload.transfer import make_transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Sequence

    from shared_kernels.offload.blocks import BlockPlan, ParamRef, Unit
    from shared_kernels.protocols import Materializer

__all__ = ["DecodeMaterializer", "OffloadEngine"]


class DecodeMaterializer:
    """Read-only weights: what the store holds, in the compute dtype."""

    def __init__(self) -> None:
        self._resident: list[torch.Tensor] | None = None

    def parts(self, unit: int, *, training: bool) -> tuple[str, ...]:
        """Both streams: a reader gets the exact value."""
        return ("main", "lo")

    def groups(self, variants: Sequence[Hashable]) -> list[list[Hashable]]:
        """Every variant sees the same weights."""
        return [list(dict.fromkeys(variants))]

    def materialize(
        self, unit: int, buffer: UnitBuffer, group: Sequence[Hashable], *, training: bool
    ) -> tuple[dict[Hashable, list[torch.Tensor]], tuple[str, ...]]:
        """Decode; a run already kept in the compute dtype is used in place."""
        return dict.fromkeys(group, self._decode(buffer)), ()

    @staticmethod
    def _decode(buffer: UnitBuffer) -> list[torch.Tensor]:
        views = []
        for run, streams in zip(buffer.layout.runs, buffer.runs, strict=True):
            if streams.lo is None and run.codec.main is run.compute_dtype:
                views.extend(run.views(streams.main))
            else:
                decoded = run.codec.decode(streams.main, streams.lo)
                views.extend(run.views(decoded.to(run.compute_dtype)))
        return views

    def resident(
        self, unit: int, buffer: UnitBuffer, variant: Hashable, *, training: bool
    ) -> list[torch.Tensor]:
        """Decode once."""
        if self._resident is None:
            self._resident = self._decode(buffer)
        return self._resident

    def fold(self, unit: int, buffer: UnitBuffer) -> tuple[str, ...]:
        """Nothing is ever pending."""
        return ()


class OffloadEngine:
    """Wraps the blocks of a model so that their weights are there when they run, and only then.

    Outside a visit every streamed parameter is a NaN of its shape without memory behind it, so
    reading a weight at the wrong time shows in the loss.

    The model can be called as it is at any time: blocks are then visited read-only under
    ``torch.no_grad``. :meth:`lockstep` runs several probes that share every load.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: BlockPlan,
        store: WeightStore,
        materializer: Materializer | None = None,
        *,
        prefetch: int = 2,
        transfer: Any = None,
    ) -> None:
        """Take the blocks over.

        Args:
            model: The model; its parameters are already in ``store``.
            plan: Its units.
            store: Homes of the units, the resident unit's on the device.
            materializer: Makes the weights a visit binds; default: decode the store.
            prefetch: Units loaded ahead; the ring has one slot more.
            transfer: Copy back end; default: by device and kind of host memory.
        """
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        self.model, self.plan, self.store = model, plan, store
        self.device = store.device
        self.materializer = materializer or DecodeMaterializer()
        self.transfer = transfer or make_transfer(
            store.device, registered=store.registered or not store.streamed
        )
        self.ring = DeviceRing(store, self.transfer, prefetch + 1)
        self.visits: Counter[int] = Counter()
        self._prefetch = prefetch
        self._follows: dict[int, int] = {}
        self._last: int | None = None
        self._probe = threading.local()
        self._active: list[Probe] | None = None
        self._undo: list[Callable[[], None]] = []
        self._workers: list[Worker] = []
        weakref.finalize(self, _stop, self._workers)
        self._params = [_bindable(unit, layout) for unit, layout in _pairs(plan, store)]
        self._blank = [[_blank(p, self.device) for p in params] for params in self._params]
        self._move_buffers()
        for unit in plan.units:
            self._unbind(unit.index)
        for unit in plan.blocks:
            self._wrap(unit)
        for module in _ancestors(model, plan):
            self._wrap_ancestor(module)
        self._undo.append(model.register_state_dict_pre_hook(_refuse_state_dict).remove)

    # -- weights ---------------------------------------------------------------------------------

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    module._buffers[name] = buffer.to(self.device)

    def _bind(self, unit: int, views: Sequence[torch.Tensor]) -> None:
        # Autocast caches casts by parameter, in one table for all threads. Here one parameter takes
        # the weights of every probe in turn, and would be computed with in those of the first.
        torch.clear_autocast_cache()
        for param, view in zip(self._params[unit], views, strict=True):
            param.data = view

    def _unbind(self, unit: int) -> None:
        self._bind(unit, self._blank[unit])

    def bind_resident(self, variant: Hashable, *, training: bool) -> None:
        """Give the parameters outside the blocks the weights of ``variant``."""
        unit = self.plan.resident.index
        buffer = self.store.home(unit)
        views = self.materializer.resident(unit, buffer, variant, training=training)
        self._bind(unit, [*views, *buffer.frozen])

    # -- visits ----------------------------------------------------------------------------------

    def _predict(self, unit: int) -> list[int]:
        ahead, at = [], unit
        for _ in range(self._prefetch):
            at = self._follows.get(at, (at + 1) % len(self.plan.blocks))
            if at == unit or at in ahead:
                break
            ahead.append(at)
        return ahead

    def visit(
        self,
        unit: int,
        variants: Sequence[Hashable],
        body: Callable[[Hashable], None],
        *,
        training: bool,
    ) -> None:
        """Load a unit once, and call ``body`` for each distinct variant with its weights bound.

        Args:
            unit: Index of a block.
            variants: Weights wanted; duplicates are served together.
            body: Runs with the block's weights bound.
            training: Passed to the materializer: whether pending updates may be folded in.
        """
        if self._last is not None:
            self._follows[self._last] = unit
        self._last = unit
        self.visits[unit] += 1
        streamed = unit not in self.store.on_device
        parts = self.materializer.parts(unit, training=training)
        if streamed:
            buffer = self.ring.acquire(unit, parts)
            ahead = self._predict(unit)
            for following in ahead:
                if following in self.store.on_device:
                    continue
                wanted = self.materializer.parts(following, training=training)
                self.ring.request(following, wanted, keep=ahead)
        else:
            buffer = self.store.home(unit)
        try:
            for group in self.materializer.groups(variants):
                views, changed = self.materializer.materialize(
                    unit, buffer, group, training=training
                )
                if changed and streamed:
                    self.ring.write_back(unit, changed)
                for variant in group:
                    self._bind(unit, [*views[variant], *buffer.frozen])
                    body(variant)
        finally:
            self._unbind(unit)
            if streamed:
                self.ring.release()

    @contextmanager
    def borrow(self, unit: int, changed: Sequence[str] = ()) -> Generator[UnitBuffer]:
        """Have a unit on the device, outside a visit, for the time of a ``with`` block.

        Args:
            unit: Index of any unit.
            changed: Streams to copy home afterwards; a list may be filled inside the block.
        """
        if unit in self.store.on_device:
            yield self.store.home(unit)
            return
        try:
            yield self.ring.acquire(unit, ("main", "lo"))
            if changed:
                self.ring.write_back(unit, changed)
        finally:
            self.ring.release()

    def flush(self) -> None:
        """Have every unit's pending updates folded into its home, and wait for the copies."""
        for unit in self.plan.units:
            changed: list[str] = []
            with self.borrow(unit.index, changed) as buffer:
                changed += self.materializer.fold(unit.index, buffer)
        self.transfer.synchronize()

    # -- running the model -----------------------------------------------------------------------

    def _replace_forward(self, module: nn.Module, wrap: Callable[[Callable], Callable]) -> None:
        original, own = module.forward, module.__dict__.get("forward")
        module.forward = functools.wraps(original)(wrap(original))

        def undo() -> None:
            if own is None:
                del module.forward
            else:
                module.forward = own

        self._undo.append(undo)

    def _wrap(self, unit: Unit) -> None:
        def wrap(original: Callable) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                probe: Probe | None = getattr(self._probe, "current", None)
                if probe is not None:
                    probe.wait_at(unit.index)
                    return original(*args, **kwargs)
                return self._read_only(unit.index, lambda: original(*args, **kwargs))

            return forward

        if unit.module is not None:
            self._replace_forward(unit.module, wrap)

    def _wrap_ancestor(self, module: nn.Module) -> None:
        """A call that is not a probe's sees current weights everywhere, and no gradient flows."""

        def wrap(original: Callable) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._active is not None:
                    return original(*args, **kwargs)
                self.bind_resident(None, training=False)
                with torch.no_grad():
                    return original(*args, **kwargs)

            return forward

        self._replace_forward(module, wrap)

    def _read_only(self, unit: int, call: Callable[[], Any]) -> Any:
        if self._active is not None:
            raise RuntimeError(
                "the model was called from a thread that is not one of the running probes; "
                "objectives must run the model on the thread they are called on"
            )
        out = None

        def body(_: Hashable) -> None:
            nonlocal out
            out = call()

        with torch.no_grad():
            self.visit(unit, [None], body, training=False)
        return out

    def lockstep(
        self,
        probes: Sequence[tuple[Callable[[], Any], Hashable]],
        *,
        training: bool = True,
        random: bool = True,
    ) -> list[Any]:
        """Run several probes, loading each block once for all that wait for it.

        Args:
            probes: Pairs of a function without arguments and the variant of the weights it sees.
            training: Whether visits may fold pending updates.
            random: Whether the functions may draw from torch's generators. Every probe then
                starts from the same state, so that dropout masks and samples agree; the caller's
                state moves on as if the first probe alone had run.

        Returns:
            The functions' results, in order.

        Raises:
            RuntimeError: Called from inside a probe.
            BaseException: Whatever the first failing probe raised; the others are ended first.
        """
        if self._active is not None:
            raise RuntimeError("lockstep() was called while another one runs on this engine")
        running = [Probe(function, variant) for function, variant in probes]
        state = ThreadState(self.device)
        start = RngState(self.device) if random else None

        def adopt(probe: Probe | None) -> None:
            self._probe.current = probe

        while len(self._workers) < len(running):
            self._workers.append(Worker())
        self._active = running
        try:
            for probe, worker in zip(running, self._workers, strict=False):
                probe.rng = start
                probe.start(worker, state, adopt)
            for probe in running:
                self._resume(probe, training)
            while any(not p.done for p in running):
                self._next_visit(running, training)
            self._raise_first(running)
        finally:
            for probe in running:
                probe.cancel()
            self._active = None
            self._unbind(self.plan.resident.index)
        if running[0].rng is not None:
            running[0].rng.restore()
        return [p.result for p in running]

    @staticmethod
    def _raise_first(probes: Sequence[Probe]) -> None:
        for probe in probes:
            if probe.error is not None:
                raise probe.error

    def _resume(self, probe: Probe, training: bool) -> None:
        self.bind_resident(probe.variant, training=training)
        if probe.rng is None:
            probe.resume()
        else:
            probe.rng.restore()
            probe.resume()
            probe.rng = RngState(self.device)
        if probe.error is not None:
            raise probe.error

    def _next_visit(self, probes: Sequence[Probe], training: bool) -> None:
        waiting = [p for p in probes if not p.done]
        wanted = Counter(p.waiting_for for p in waiting)
        unit = max(wanted, key=lambda k: (wanted[k], -k))
        here = [p for p in waiting if p.waiting_for == unit]

        def body(variant: Hashable) -> None:
            for probe in here:
                if probe.variant == variant:
                    self._resume(probe, training)

        self.visit(unit, [p.variant for p in here], body, training=training)

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the model its own ``forward`` methods back; its weights stay in the store."""
        self.transfer.synchronize()
        while self._undo:
            self._undo.pop()()
        _stop(self._workers)


def _stop(workers: list[Worker]) -> None:
    while workers:
        workers.pop().stop()


def _ancestors(model: nn.Module, plan: BlockPlan) -> list[nn.Module]:
    """The modules that contain blocks, the model first: whichever of them is called."""
    names = {""}
    for unit in plan.blocks:
        parts = unit.name.split(".")
        names.update(".".join(parts[:k]) for k in range(1, len(parts)))
    found = [model.get_submodule(name) for name in sorted(names)]
    return [m for m in found if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]


def _pairs(plan: BlockPlan, store: WeightStore) -> list[tuple[Unit, Any]]:
    return list(zip(plan.units, store.layouts, strict=True))


def _bindable(unit: Unit, layout: Any) -> list[nn.Parameter]:
    order: list[ParamRef] = [p for run in layout.runs for p in run.params] + list(layout.frozen)
    return [p.parameter for p in order]


def _blank(param: nn.Parameter, device: torch.device) -> torch.Tensor:
    fill = float("nan") if param.is_floating_point() else 0
    return torch.full((), fill, dtype=param.dtype, device=device).expand(param.shape)


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(
        "the weights of this model live in its offload engine: use engine.state_dict() or "
        "engine.save_pretrained(folder)"
    )
