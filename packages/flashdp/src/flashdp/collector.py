"""Gathers what backward passes leave behind, clips it unit by unit, and sums it.

Gradients of private parameters never reach ``p.grad``: layers record their inputs and output
gradients here, and when everything of a clipping group has arrived, the group's per-unit norms are
taken, factors follow, and the clipped sum is added to a float32 accumulator.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.ops.dp import clip_factors

from flashdp.errors import PrivacyError
from flashdp.records import MatrixRecord, inner_product, join
from flashdp.sharding import is_sharded, reduce_scatter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from torch import Tensor, nn

    from flashdp.units import Units

__all__ = ["Collector", "Group", "Part", "PrivateLayer", "Use"]


@dataclass(eq=False)
class PrivateLayer:
    """A module whose own parameters are private.

    Attributes:
        name: Name in the model.
        module: The module.
        names: Full name of each covered parameter, by its name in the module.
        rule: Name of the rule that covers it, for reports.
        flattened: Whether its model merges (rows, tokens) before it, in order.
    """

    name: str
    module: nn.Module = field(repr=False)
    names: dict[str, str]
    rule: str = ""
    flattened: bool = False
    parts: list[Part] = field(default_factory=list, repr=False)
    # As the optimizer holds them: inside a forward a sharded module has whole ones in their place.
    _parameters: dict[str, nn.Parameter] = field(init=False, repr=False)
    # State of one pass.
    records: list = field(default_factory=list, repr=False)
    pending: int = 0
    opened: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        """Note the parameters."""
        own = self.module._parameters
        self._parameters = {n: p for n in self.names if (p := own[n]) is not None}

    def reset(self) -> None:
        """Forget the pass."""
        self.records, self.pending, self.opened, self.closed = [], 0, 0, False

    def parameter(self, local: str) -> nn.Parameter:
        """The parameter of a name in the module."""
        return self._parameters[local]


@dataclass(eq=False)
class Part:
    """Parameters of one layer that are clipped together; ``names`` are names in the module."""

    layer: PrivateLayer
    names: tuple[str, ...]


@dataclass(eq=False)
class Group:
    """Parts under one threshold; ``index`` is its place in the tensor of thresholds."""

    index: int
    name: str
    parts: list[Part]
    late: bool = False
    """Whether it is closed only when the backward pass ends."""

    @property
    def layers(self) -> list[PrivateLayer]:
        """Its layers, each once."""
        return list(dict.fromkeys(part.layer for part in self.parts))


class Use:
    """One forward of one layer, waiting for its backward."""

    __slots__ = ("collector", "layer", "number", "units")

    def __init__(self, collector: Collector, layer: PrivateLayer, number: int, units: Units):
        self.collector, self.layer, self.number, self.units = collector, layer, number, units

    def record(self, make: Callable[[Units], object]) -> None:
        """Hand over what the backward pass has found."""
        self.collector.record(self, make)


class Collector:
    """See the module's docstring.

    Attributes:
        sums: Clipped sum of each parameter since the last :meth:`take`, float32 or wider; of a
            sharded one this rank's part of the sum over ranks.
        below: Per group, how many units were under their threshold, centred: each counts +1/2
            or -1/2 (None unless asked for).
        batch: Number of the batch that the model was called with last, where it is known.
    """

    def __init__(
        self,
        layers: Sequence[PrivateLayer],
        groups: Sequence[Group],
        *,
        clipping: str = "abadi",
        stability: float = 0.01,
        strategy: Callable[[MatrixRecord, Units], str] | None = None,
        count: bool = False,
    ) -> None:
        """Wire layers and groups.

        Args:
            layers: All private layers.
            groups: Their clipping groups.
            clipping: "abadi" or "automatic".
            stability: γ of automatic clipping.
            strategy: Chooses "gram", "recompute" or "spill" for a matrix; default: spill.
            count: Whether to count units below their thresholds.
        """
        self.layers, self.groups = list(layers), list(groups)
        self.clipping, self.stability = clipping, stability
        self.strategy = strategy or (lambda record, units: "spill")
        self._of = {id(layer.module): layer for layer in self.layers}
        self._groups_of: dict[PrivateLayer, list[Group]] = {layer: [] for layer in self.layers}
        for group in self.groups:
            for layer in group.layers:
                self._groups_of[layer].append(group)
        self.thresholds: Tensor | None = None
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.below: Tensor | None = None
        self._count = count
        self.batch: int | None = None
        # Batches of this step that are in the sums, and by which pass; the last of earlier steps.
        self._summed: dict[int, int] = {}
        self._past = 0
        self._units: Units | None = None
        self._number = 0
        self._callback = False
        self._shared = self._find_shared()

    def _find_shared(self) -> set[nn.Parameter]:
        seen: dict[nn.Parameter, PrivateLayer] = {}
        shared = set()
        for layer in self.layers:
            for local in layer.names:
                param = layer.parameter(local)
                if seen.setdefault(param, layer) is not layer:
                    shared.add(param)
        return shared

    # -- a pass ----------------------------------------------------------------------------------

    def begin(self, units: Units, batch: Any = None) -> None:
        """Start a forward pass of the model. An earlier one without a backward is forgotten.

        Args:
            units: Of the batch.
            batch: Its number, where a loader has numbered it.
        """
        if self._callback or any(layer.records for layer in self.layers):
            # Trying a batch again after its backward ran out of memory would count it twice.
            raise PrivacyError(
                "the model was called while a backward pass was under way, or after one that "
                "failed: a part of that batch is in the sums already; start again from a checkpoint"
            )
        for layer in self.layers:
            layer.reset()
        self._units = units
        self.batch = None if batch is None else int(batch)
        self._number += 1

    def open(self, module: nn.Module) -> Use | None:
        """Announce a forward of a layer; None where no gradient will flow."""
        if not torch.is_grad_enabled():
            return None
        layer = self._of[id(module)]
        if self._units is None:
            raise PrivacyError(
                f"layer {layer.name!r} ran outside a forward of the model made private: its "
                "gradients could not be given to privacy units; call the model itself, or work "
                "under torch.no_grad()"
            )
        in_backward = torch._C._current_graph_task_id() != -1
        # Activation checkpoints run a layer again inside the backward pass. Non-reentrant ones
        # only look at what it saves: the node that was made in the forward will record.
        if not in_backward:
            layer.opened += 1
            layer.pending += 1
        elif not layer.opened:
            layer.pending += 1
        return Use(self, layer, self._number, self._units)

    def record(self, use: Use, make: Callable[[Units], object]) -> None:
        """Take a record; close what is complete.

        Raises:
            PrivacyError: It belongs to an earlier forward, or its group was closed already.
        """
        layer = use.layer
        if use.number != self._number:
            raise PrivacyError(
                f"backward of an earlier forward reached layer {layer.name!r}: run each batch's "
                "backward before the next forward"
            )
        if layer.closed:
            raise PrivacyError(
                f"gradients of layer {layer.name!r} arrived after they had been clipped: the "
                "backward pass ran twice, or activation checkpoints split uses of one layer or "
                "one clipping group (use use_reentrant=False, or a smaller grouping)"
            )
        if not self._callback:
            self._sum_once()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
            self._callback = True
        layer.records.append(make(use.units))
        layer.pending -= 1
        for group in self._groups_of[layer]:
            if not group.late and all(member.pending == 0 for member in group.layers):
                self._close([group])

    def _sum_once(self) -> None:
        """Refuse a batch that is in the sums already: its units would count twice."""
        if self.batch is None:
            return
        if self._summed.setdefault(self.batch, self._number) != self._number or (
            self.batch <= self._past
        ):
            raise PrivacyError(
                "the backward pass of a batch ran a second time, which would count its units twice "
                "and double what one of them can do: take the next batch from the loader, and run "
                "a forward that is only looked at under torch.no_grad(); where batches are fetched "
                "ahead of their use, make the loader with annotate=True"
            )

    def _end_of_backward(self) -> None:
        """Close every group that still holds records: not all uses lead to the loss."""
        self._close([g for g in self.groups if any(layer.records for layer in g.layers)])
        self._callback = False

    def _close(self, groups: Iterable[Group]) -> None:
        for group in groups:
            for layer in group.layers:
                if len(layer.records) > 1:
                    layer.records = join(layer.records)
            self._clip(group)
            for layer in group.layers:
                # A layer whose parameters are in groups of their own closes with all of them.
                others = self._groups_of[layer]
                if len(others) == 1 or group is others[-1]:
                    layer.records, layer.closed = [], True

    # -- clipping --------------------------------------------------------------------------------

    def _sum_of(self, param: nn.Parameter, *, written: bool = False) -> Tensor:
        if self._has_sum(param):
            return self.sums[param]
        dtype = torch.promote_types(param.dtype, torch.float32)
        make = torch.empty if written else torch.zeros
        return make(param.shape, dtype=dtype, device=param.device)

    def _has_sum(self, param: nn.Parameter) -> bool:
        return param in self.sums and not is_sharded(param)

    @contextmanager
    def _sums_of(self, part: Part, *, written: str = "") -> Generator[dict[str, Tensor]]:
        """Lend the sums of a part's parameters to be added to; one may be ``written`` first."""
        sums = {
            local: self._sum_of(part.layer.parameter(local), written=local == written)
            for local in part.names
        }
        yield sums
        # Not before: after an error unwritten memory must not be taken for a sum.
        for local in part.names:
            param, total = part.layer.parameter(local), sums.pop(local)
            if is_sharded(param):
                total = reduce_scatter(total, param)
                total = self.sums[param] + total if param in self.sums else total
            self.sums[param] = total

    @torch.no_grad()
    def _clip(self, group: Group) -> None:
        units, thresholds = self._units, self.thresholds
        assert units is not None and thresholds is not None
        parts = [part for part in group.parts if part.layer.records]
        if not parts:
            return
        threshold = thresholds[group.index]
        only = parts[0].layer.records[0] if len(parts) == 1 else None
        strategy = ""
        if (
            isinstance(only, MatrixRecord)
            and len(parts[0].layer.records) == 1
            and only.weight in parts[0].names
        ):
            strategy = self.strategy(only, units)
        if isinstance(only, MatrixRecord) and strategy in ("gram", "spill"):
            names, weight = parts[0].names, parts[0].layer.parameter(only.weight)
            fresh = strategy == "spill" and not self._has_sum(weight)
            with self._sums_of(parts[0], written=only.weight if fresh else "") as sums:
                n2 = only.clip(
                    names, units, threshold, self.clipping, self.stability, sums, strategy,
                    fresh=fresh,
                )  # fmt: skip
        else:
            n2 = self._norm2(parts, units)
            scale = clip_factors(n2, threshold.to(n2.dtype), self.clipping, self.stability)
            for part in parts:
                with self._sums_of(part) as sums:
                    for record in part.layer.records:
                        if names := _names(record, part):
                            record.accumulate(names, scale, sums)
        if self._count:
            self._count_below(group, n2, threshold, units)

    def _norm2(self, parts: Sequence[Part], units: Units) -> Tensor:
        """Squared norms, (units,); uses of one shared parameter add up before they are squared."""
        plain: list[Tensor] = []
        tied: list[Tensor] = []
        uses: list[Any] = []
        weights: set[nn.Parameter] = set()
        for part in parts:
            terms = []
            for record in part.layer.records:
                names = _names(record, part)
                if names:
                    strategy = "gram"
                    if isinstance(record, MatrixRecord):
                        strategy = self.strategy(record, units)
                    terms.append(record.norm2(names, units, strategy))
            if not terms:
                continue
            n2 = _sum(terms)
            shared = any(part.layer.parameter(local) in self._shared for local in part.names)
            (tied if shared else plain).append(n2)
            if shared:
                uses += part.layer.records
                weights |= {part.layer.parameter(local) for local in part.names} & self._shared
        # |a + b|^2 = |a|^2 + |b|^2 + 2 <a, b>: two uses of one parameter need not be orthogonal.
        # Uses of two parameters, of which each has another use that did not run, are no such pair.
        product = inner_product(uses, units) if len(tied) == 2 and len(weights) == 1 else None
        if product is not None:
            # They may cancel: in float64, and rounded up.
            joint = (tied[0].double() + tied[1].double() + 2 * product).clamp(min=0)
            plain.append((joint * (1 + 2.0**-22)).to(tied[0].dtype))
        elif len(tied) > 1:
            # |a + b| <= |a| + |b|
            plain.append(torch.stack(tied).clamp(min=0).sqrt().sum(0).square())
        else:
            plain += tied
        return _sum(plain)

    def _count_below(self, group: Group, n2: Tensor, threshold: Tensor, units: Units) -> None:
        if self.below is None:
            self.below = torch.zeros(len(self.groups), dtype=torch.float32, device=n2.device)
        # NaN is above every threshold.
        inside = (n2.clamp(min=0).sqrt() <= threshold).float() - 0.5
        if units.mask is not None:
            inside = inside * units.mask
        self.below[group.index] += inside.sum()

    def take(self) -> dict[nn.Parameter, Tensor]:
        """Return the sums and start new ones."""
        sums, self.sums = self.sums, {}
        self._past, self._summed = max(self._past, *self._summed, 0), {}
        return sums

    def abandon(self) -> None:
        """Drop everything gathered, as after an error."""
        self.sums, self.below, self._units, self._callback = {}, None, None, False
        for layer in self.layers:
            layer.reset()


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(tuple(terms)).sum(0)


def _names(record: object, part: Part) -> tuple[str, ...]:
    """The part's parameters that the record speaks of."""
    own = {"weight", "bias"}
    if isinstance(record, MatrixRecord):
        own = {record.weight, record.bias}
    elif hasattr(record, "name"):
        own = {record.name}
    elif hasattr(record, "weight"):
        own = {record.weight}
    return tuple(name for name in part.names if name in own)


class Handle:
    """A module's way to its collector that neither copies nor saves it."""

    def __init__(self, collector: Collector) -> None:
        self._collector = weakref.ref(collector)

    def open(self, module: nn.Module) -> Use | None:
        """See :meth:`Collector.open`."""
        collector = self._collector()
        return None if collector is None else collector.open(module)

    @contextmanager
    def lent(self, collector: Collector) -> Generator[None]:
        """Lead to another collector inside a ``with`` block."""
        own, self._collector = self._collector, weakref.ref(collector)
        try:
            yield
        finally:
            self._collector = own

    def __deepcopy__(self, memo: dict) -> Handle:
        return self

    def __reduce__(self) -> tuple:
        return (_detached, ())


def _detached() -> None:
    return None
