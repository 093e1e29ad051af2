"""Does one unit's data move another unit's gradient? A numeric answer, on a batch.

Clipping bounds what a unit adds to a sum only if no unit's gradient depends on another's data. The
batch is run forward and backward, then again with the data of every second unit replaced, and again
with that of the others. Gradients of the units left alone must be what they were. Compared are not
norms, which may stay while a gradient turns, but projections of every unit's gradient of every
layer on fixed random directions: they move whenever the gradient does, and cost two thin products.

Tolerance. Equal shapes run the same kernels, which compute a row from that row alone, so what does
not depend on the others is mostly equal to the bit. Where it is not (sums in the order of atomics,
tokens routed to experts), both runs are correct up to rounding. Storing a number in a dtype of
spacing eps errs by eps / sqrt(12) (root mean square); some six roundings between two private layers
and two runs make that one eps per layer, L layers a random walk of sqrt(L) eps, and 2 is for the
tail. Products add up in float32 (float64) with an error of some of its eps, taken as 16. Hence

    tolerance = sqrt(L) (2 eps_stored + 16 eps_accumulated),

relative to the root of ``sum_t |g_t|^2 |a_t|^2`` over the unit's tokens, the size of what rounds,
which a gradient that cancels does not reach; and to no less than 1/100 of that of the unit's
largest layer, from which the error of a nearly vanishing one comes. With 100 layers that is 2e-5 in
float32 and 0.16 in bfloat16, in which weaker couplings between routed tokens can hide.
"""

from __future__ import annotations

import math
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels.ops.dp import segment_sums
from torch import nn
from torch.utils import _pytree as pytree

from flashdp.collector import Collector, Group, Part, PrivateLayer
from flashdp.errors import PrivacyError
from flashdp.losses import loss_owner
from flashdp.records import MatrixRecord, RowsRecord, TableRecord
from flashdp.replacement import other_values, replaced
from flashdp.rules.base import handle_of
from flashdp.sharding import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from torch import Tensor

    from flashdp.engine import PrivacyEngine
    from flashdp.units import Units

__all__ = ["Independence"]

_DIRECTIONS = 16
_SMALL = 1e-2
_TRIES = 3

_FORWARD = (
    "their data reaches the unit's activations: statistics or means over the batch, attention "
    "across rows, or a batch that is not the first dimension. Replace that layer by one that works "
    "within a row (GroupNorm, LayerNorm), or freeze it with fixed statistics"
)
_LOSS = (
    "the layers' inputs are as before, so it is the loss: a mean over the tokens of the whole "
    "batch, a router's load-balancing loss, in-batch negatives. Compute it from the logits by "
    "flashdp.per_sample_loss(logits, labels).sum(), and turn such a term off "
    "(output_router_logits=False)"
)


class _UnreadableError(Exception):
    """The outputs hold nothing that belongs to rows."""


class _VacuousError(Exception):
    """No replaced unit's gradient moved."""


class Independence:
    """The probe of one engine, and what it has shown so far.

    Attributes:
        wanted: Whether batches are probed unasked.
        by_itself: Whether that is when the model is called, and nobody else does it.
        running: Whether a probe is under way.
    """

    def __init__(self, engine: PrivacyEngine, *, wanted: bool = True) -> None:
        """Make a probe that has shown nothing."""
        self._engine, self.wanted = engine, wanted
        self.by_itself, self.running = True, False
        # By the model's mode, training or not: what was probed, or None where that failed.
        self._shown: dict[bool, str | None] = {}
        self._tries = 0

    @property
    def status(self) -> str:
        """``loss``, ``outputs`` (all but a loss outside the model), ``inconclusive``, ``skipped``.

        And ``not needed`` as long as no batch had two units.
        """
        shown = set(self._shown.values())
        if None in shown or (self._tries and not shown):
            return "inconclusive"
        if shown:
            return "outputs" if "outputs" in shown else "loss"
        return "not needed" if self.wanted else "skipped"

    def due(self, units: int) -> bool:
        """Whether a batch of so many units is to be probed before it is used."""
        mode = self._model.training
        return self.wanted and not self.running and units > 1 and mode not in self._shown

    def before(self, args: tuple, kwargs: dict[str, Any], units: Units, rows: Any) -> None:
        """Probe what the model is about to be called with, if that is due."""
        if self.by_itself and not self._any(not self.due(len(units))):
            self.check((args, kwargs if rows is None else {**kwargs, "dp_rows": rows}))

    def check(self, batch: Any, run: Callable[[Any], Tensor] | None = None) -> None:
        """Probe a batch unasked: where it shows nothing, that is noted.

        Args:
            batch: Positional and keyword arguments of the model, or what ``run`` takes.
            run: Calls the model and returns the loss.

        Raises:
            PrivacyError: Units are coupled, or other values cannot be put in.
        """
        mode = self._model.training
        try:
            self._shown[mode] = self._compare(batch, run or self._outputs, None)
        except _UnreadableError:
            self._shown[mode] = None
        except _VacuousError:
            self._tries += 1
            if self._tries == _TRIES:
                self._shown[mode] = None

    def validate(self, batch: Any, loss: Callable[[Any, Any], Tensor] | None, other: Any) -> None:
        """See :meth:`flashdp.PrivacyEngine.validate`."""
        model, form = self._model, _call_of if loss is None else _plain
        run = self._outputs if loss is None else lambda batch: loss(model, batch)
        try:
            shown = self._compare(form(batch), run, None if other is None else form(other))
        except _UnreadableError:
            raise ValueError(
                "the model's output has no loss and no tensor with a row for each of the batch's: "
                "give loss=, a function of the model and the batch"
            ) from None
        except _VacuousError:
            raise ValueError(
                "replacing data of the batch moved no unit's gradient, so it shows nothing: give a "
                "batch with labels, or other=, a batch of the same shapes and other values"
            ) from None
        self._shown[model.training] = shown

    def _any(self, here: Any) -> bool:
        """Whether something holds here, or, with sharded parameters, on any rank.

        Ranks that did not do the same would wait for each other forever.
        """
        params = self._engine._parameters
        if not any(map(is_sharded, params)):
            return bool(here)
        found = torch.tensor(int(here), device=next(iter(params)).device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return bool(found)

    # -- one comparison --------------------------------------------------------------------------

    @property
    def _model(self) -> nn.Module:
        model = self._engine._model
        if model is None:
            raise RuntimeError("the engine has no model: call make_private first")
        return model

    def _outputs(self, call: tuple[tuple, dict[str, Any]]) -> Tensor:
        """Call the model; return its loss, or a sum over rows of its outputs."""
        (args, kwargs), inner = call, self._model
        while isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        if inner is not self._model:
            # Ranks may have different batches to probe, so nothing may be reduced here.
            args, kwargs = self._engine._before_forward(args, kwargs)
        out = inner(*args, **kwargs)
        loss = out if isinstance(out, torch.Tensor) and not out.ndim else None
        if loss is None:
            loss = out.get("loss") if hasattr(out, "get") else getattr(out, "loss", None)
        if loss is not None:
            return loss.sum()
        projections: Any = self._engine.collector
        projections.kind = "outputs"
        units = projections._units
        dims = units.row_dims
        # Bounded, so that no row drowns the others; not constant for what is normalised.
        sums = [
            x.sum() if x.ndim == dims else nn.functional.softsign(x).flatten(dims).mean(-1).sum()
            for x in pytree.tree_leaves(out)
            if isinstance(x, torch.Tensor)
            and x.requires_grad
            and x.ndim >= dims
            and x.shape[:dims].numel() == units.rows
        ]
        if not sums:
            raise _UnreadableError
        return torch.stack([s.float() for s in sums]).sum()

    def _compare(self, batch: Any, run: Callable[[Any], Tensor], other: Any) -> str:
        first = self._run(run, batch)
        units = first._units
        assert units is not None
        if len(units) < 2:
            raise ValueError(f"the probe needs a batch of at least 2 units, this has {len(units)}")
        lengths = units.cu_rows.diff().cpu()
        moved_at_all = False
        for parity in (1, 0):
            changed = torch.arange(len(units)) % 2 == parity
            rows = changed.repeat_interleave(lengths)
            packed = units.row_dims > 1
            second = self._run_replaced(run, batch, other, rows, packed=packed)
            moves = first.moved(second)
            tolerance = first.tolerance()
            moved_at_all |= self._any((moves[:, changed] > tolerance).any())
            coupled = (moves[:, ~changed] > tolerance).any()
            if self._any(coupled):
                repeated = first.moved(self._run(run, batch))
                if not coupled:
                    raise PrivacyError("units of the batch are coupled on another rank")
                if bool((repeated > tolerance).any()):
                    raise PrivacyError(
                        "the model gives other gradients for the same batch and the same state of "
                        "torch's, numpy's and Python's generators, so that it cannot be checked "
                        "whether units are independent: draw its random numbers from those"
                    )
                raise PrivacyError(first.complaint(second, moves, ~changed, tolerance))
        if not moved_at_all:
            raise _VacuousError
        return first.kind

    def _run_replaced(
        self, run: Callable[[Any], Tensor], batch: Any, other: Any, rows: Tensor, *, packed: bool
    ) -> _Projections:
        has_config = hasattr(loss_owner(self._model), "config")
        if other is None:
            # Special tokens, which stand for parts of an image say, are as many in a row's own.
            recipes = [
                other_values(batch, from_row_before=b, has_config=has_config, packed=packed)
                for b in (True, False)
            ]
        else:
            recipes = [other]
        for recipe in recipes:
            changed = replaced(batch, recipe, rows, packed=packed)
            try:
                return self._run(run, changed)
            except Exception as error:
                failure = error
        raise PrivacyError(
            "whether units of a batch are independent could not be checked: with other values in "
            f"it the model raised {type(failure).__name__}: {failure}; call "
            "engine.validate(batch, other=...) with a second batch of the same shapes"
        ) from failure

    def _run(self, run: Callable[[Any], Tensor], batch: Any) -> _Projections:
        """Run a batch forward and backward, and leave everything as it was."""
        engine, model = self._engine, self._model
        collector = engine.collector
        assert collector is not None
        projections = _Projections(collector.layers)
        handle = handle_of(collector.layers[0].module)
        batch = pytree.tree_map_only(torch.Tensor, _apart, batch)
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        self.running, engine.collector = True, projections
        try:
            with (
                handle.lent(projections),
                _untouched(model),
                _random_state(devices),
                torch.enable_grad(),
            ):
                run(batch).backward()
        finally:
            self.running, engine.collector = False, collector
        return projections


class _Projections(Collector):
    """Keeps projections of every unit's gradients in place of clipped sums."""

    def __init__(self, layers: Sequence[PrivateLayer]) -> None:
        twins = [PrivateLayer(y.name, y.module, y.names, y.rule, y.flattened) for y in layers]
        for twin in twins:
            twin.parts = [Part(twin, tuple(twin.names))]
        super().__init__(twins, [Group(k, t.name, t.parts) for k, t in enumerate(twins)])
        self.found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.dtypes: set[torch.dtype] = set()
        self.kind = "loss"

    @torch.no_grad()
    def _clip(self, group: Group) -> None:
        layer = group.parts[0].layer
        if not layer.records:
            return
        parts = [_project(record, layer) for record in layer.records]
        self.dtypes |= {record.g.dtype for record in layer.records}
        gradient, size2, inputs = (
            sum(values).double().cpu() for values in zip(*parts, strict=True)
        )
        self.found[layer.name] = (gradient, size2.clamp(min=0).sqrt(), inputs)

    def tolerance(self) -> float:
        """See the module's docstring."""
        stored = max(torch.finfo(dtype).eps for dtype in self.dtypes)
        wide = max(torch.finfo(torch.promote_types(d, torch.float32)).eps for d in self.dtypes)
        return math.sqrt(len(self.found)) * (2 * stored + 16 * wide)

    def moved(self, other: _Projections) -> Tensor:
        """How far each unit's gradient of each layer moved, relative to its size, (layers, units).

        Layers are in the order of the backward pass.
        """
        pairs = [self._pair(other, name) for name in self.found]
        sizes = torch.stack([torch.maximum(mine[1], its[1]) for mine, its in pairs])
        sizes = torch.maximum(sizes, _SMALL * torch.where(sizes.isfinite(), sizes, 0).amax(0))
        return torch.stack(
            [
                _distance(mine[0], its[0], size)
                for (mine, its), size in zip(pairs, sizes, strict=True)
            ]
        )

    def _pair(self, other: _Projections, name: str) -> tuple[tuple, tuple]:
        mine = self.found[name]
        # A layer that took no part in the other run has no gradient there.
        return mine, other.found.get(name, tuple(x * 0 for x in mine))

    def complaint(self, other: _Projections, moves: Tensor, kept: Tensor, tolerance: float) -> str:
        """What to tell the user: which layers, which units, why, and what to do."""
        names = list(self.found)
        wrong = (moves > tolerance) & kept
        rows = wrong.any(1).nonzero().flatten().tolist()
        worst = max(rows, key=lambda k: float(moves[k][kept].max()))
        units = wrong.any(0).nonzero().flatten().tolist()
        # The first, in the order of the forward pass, whose inputs moved.
        reached = [n for n in names if bool((self._inputs_moved(other, n)[kept] > tolerance).any())]
        cause = f"at the input of layer {reached[-1]!r} or before, {_FORWARD}" if reached else _LOSS
        shown = ", ".join(map(str, units[:4])) + ("..." if len(units) > 4 else "")
        return (
            f"units of the batch are coupled: with other units' data replaced, unit {shown} has "
            f"another gradient in {len(rows)} of {len(names)} layers, most in {names[worst]!r} "
            f"(moved by {float(moves[worst][kept].max()):.1g} of its size, tolerance "
            f"{tolerance:.1g}). Clipping would not bound what a unit does. Probably {cause}"
        )

    def _inputs_moved(self, other: _Projections, name: str) -> Tensor:
        (*_, mine), (*_, its) = self._pair(other, name)
        return _distance(mine, its, torch.maximum(mine.abs(), its.abs()).amax(1))


def _distance(left: Tensor, right: Tensor, size: Tensor) -> Tensor:
    """Root mean square over directions of what differs, in units of ``size``; NaN equals NaN."""
    same = (left == right) | (left.isnan() & right.isnan())
    difference = torch.where(same, 0, left - right).square().mean(1).sqrt()
    found = torch.where(difference == 0, 0, difference / size)
    return found.nan_to_num(math.inf, math.inf)


def _project(record: Any, layer: PrivateLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Project the units' gradients of a layer.

    Returns:
        Projections (units, directions), squared size (units,), and projections of the inputs that
        the gradients are made of (units, directions), zero where they are not known.
    """
    g, g2 = record.g.flatten(1), _norms2(record.g.flatten(1))
    wide = g2.dtype
    if isinstance(record, RowsRecord):
        per_unit = segment_sums(g, record.cu)
        found = per_unit @ _directions(g.shape[1], per_unit)
        return found, segment_sums(g2[:, None], record.cu)[:, 0], torch.zeros_like(found)
    down = (g @ _directions(g.shape[1], g)).to(wide)
    up, up2 = torch.zeros_like(down), torch.zeros_like(g2)
    if isinstance(record, TableRecord):
        up = _directions(len(layer.parameter(record.weight)), down, salt=1)[record.tokens]
        up2 = up2 + 1
    elif record.weight in layer.names:
        up = (record.a @ _directions(record.a.shape[1], record.a, salt=1)).to(wide)
        up2 = _norms2(record.a)
    inputs = segment_sums(up, record.cu)
    if isinstance(record, MatrixRecord) and record.bias in layer.names:
        up, up2 = up + _directions(1, down, salt=2), up2 + 1
    size2 = segment_sums((g2 * up2)[:, None], record.cu)[:, 0]
    return segment_sums(down * up, record.cu), size2, inputs


def _norms2(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=1, dtype=wide).square()


def _directions(size: int, like: Tensor, *, salt: int = 0) -> Tensor:
    """The same normal numbers for the same size and salt, (size, directions)."""
    generator = torch.Generator().manual_seed(3 * size + salt)
    return torch.randn(size, _DIRECTIONS, generator=generator).to(like)


# -- what a run must not change --------------------------------------------------------------------


def _apart(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


@contextmanager
def _untouched(model: nn.Module) -> Generator[None]:
    """Put buffers back as they were."""
    before = [
        (module, name, b, b._version, b.detach().clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, version, values in before:
                if buffer._version != version:
                    buffer.copy_(values)
                module._buffers[name] = buffer


@contextmanager
def _random_state(devices: Iterable[int]) -> Generator[None]:
    """Put the states of random generators back as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _plain(batch: Any) -> Any:
    """A mapping as a dict, in which pytrees look."""
    return dict(batch) if hasattr(batch, "keys") else batch


def _call_of(batch: Any) -> tuple[tuple, dict[str, Any]]:
    if hasattr(batch, "keys"):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}
