"""Tensors that come out, each made from those that go in when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._checks import message

from slimmoe.architectures import Axis
from slimmoe.merging.grouping import Experts
from slimmoe.merging.merge import alignment, average
from slimmoe.planning import comes_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from slimmoe.architectures import Match
    from slimmoe.planning import CompressionPlan
    from slimmoe.weights import Source


#: Fields that change with how a model was loaded, and no plan.
_NO_SIZES = {"architectures", "dtype"}


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Output:
    """A tensor that comes out.

    Attributes:
        name: Of it.
        shape: Of it.
        dtype: Of it.
        make: Reads what it is made of, and makes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def taken(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return a tensor with some of an axis, as `torch.index_select`.

    Along the last axis on a CPU numpy takes a fourth of the time.
    """
    if tensor.device.type != "cpu" or dim < tensor.ndim - 1 or tensor.ndim < 2:
        return tensor.index_select(dim, index.to(tensor.device))
    bits = _BITS[tensor.dtype.itemsize]
    found = np.take(tensor.contiguous().view(bits).numpy(), index.numpy(), axis=-1)
    return torch.from_numpy(found).view(tensor.dtype)


class Rewriter:
    """Makes the tensors of a plan.

    Args:
        source: Of the weights that go in.
        plan: Of what becomes of them.
        moment: Where the weights are moments of gradients, their power.
        aligned: Then, of the weights themselves, by which neurons are ordered.

    Raises:
        ValueError: The plan is of another model.
    """

    def __init__(
        self,
        source: Source,
        plan: CompressionPlan,
        moment: int = 0,
        aligned: Rewriter | None = None,
    ) -> None:
        fields = (source.config.keys() | plan.source.keys()) - _NO_SIZES
        differ = sorted(key for key in fields if source.config.get(key) != plan.source.get(key))
        if differ:
            raise ValueError(message("plan", "one of this model", differ, "these fields differ"))
        self.source, self.plan, self.family = source, plan, source.family
        self.moment, self.aligned = moment, aligned
        self._new = {layer: place for place, layer in enumerate(plan.layers)}
        self._channels = None if plan.channels is None else torch.tensor(plan.channels)
        self._orders: dict[tuple[int, int], Tensor] = {}
        self._ordered: int | None = None

    def outputs(self) -> Iterator[Output]:
        """Return the tensors that come out, in the order of those that go in."""
        for match in self.source.matches.values():
            if not comes_out(match, self._new, self.plan.mtp):
                continue
            experts = self._experts(match)
            if match.expert is not None and match.expert not in experts.kept:
                continue
            yield self._output(match, experts)

    def _experts(self, match: Match) -> Experts:
        place = self.source.place(match)
        found = None if place is None else self.plan.experts.get(place)
        if found is None:
            count = self.family.count(self.source.config)
            found = Experts.alone(list(range(count)))
        return found

    def _output(self, match: Match, experts: Experts) -> Output:
        layer = None if match.layer is None else self._new[match.layer]
        axes, at = match.row.axes, None
        if match.expert is not None:
            at = experts.kept.index(match.expert)
        name = self.family.name(match, layer, at, len(self.plan.layers))
        shape = tuple(
            self._size(axis, size, experts)
            for axis, size in zip(axes, self.source.weights.shape(match.name), strict=True)
        )
        routed = match.expert is not None or (Axis.EXPERT in axes and not self._of_router(match))

        def make() -> Tensor:
            if not routed:
                return self._whole(match, experts)
            if at is not None:
                return self._expert(match, experts, at)
            return torch.stack([
                self._expert(match, experts, number) for number in range(len(experts.kept))
            ])  # fmt: skip

        return Output(name, shape, self.source.weights.dtype(match.name), make)

    @staticmethod
    def _of_router(match: Match) -> bool:
        """Return whether experts are rows of a router or of its biases, which are not averaged."""
        return match.row.router or (len(match.row.axes) == 1 and match.row.axes[0] is Axis.EXPERT)

    def _size(self, axis: Axis, size: int, experts: Experts) -> int:
        plan = self.plan
        neurons = int(plan.config[self.family.neurons])
        channels = size if plan.channels is None else len(plan.channels)
        return {
            Axis.RESIDUAL: channels,
            Axis.TWO_RESIDUALS: size if plan.channels is None else 2 * channels,
            Axis.EXPERT: len(experts.kept), Axis.NEURON: neurons, Axis.GATE_UP: 2 * neurons,
            Axis.GATE_UP_IN_TURNS: 2 * neurons,
        }.get(axis, size)  # fmt: skip

    # --- one tensor ------------------------------------------------------------------------------

    def _read(self, match: Match, index: Any = ...) -> Tensor:
        return self.source.weights.read(match.name, index)

    def _expert(self, match: Match, experts: Experts, at: int) -> Tensor:
        """Return the tensor of one expert that comes out."""
        members = experts.members[at]
        parts = [lambda member=member: self._member(match, members[0], member)
                 for member in members]  # fmt: skip
        tensor = average(parts, experts.weights[at])
        place = self.source.place(match)
        if place in self.plan.neurons:
            neurons = torch.tensor(self.plan.neurons[place][at])
            tensor = self._chosen(tensor, self._inner(match), neurons)
        return tensor

    def _member(self, match: Match, base: int, member: int) -> Tensor:
        """Return kept channels of an expert that goes in, its neurons in the base's order."""
        axes = self._inner(match)
        found = self._narrow(self._of(match, member), axes)
        if member == base or self.plan.options.alignment == "none":
            return found
        place = self.source.place(match)
        assert place is not None
        return self._chosen(found, axes, self._order(place, base, member))

    def _of(self, match: Match, expert: int) -> Tensor:
        if match.expert is None:
            return self._read(match, expert)
        name = self.family.name(match, match.layer, expert, self.source.layers)
        return self._read(self.source.matches[name])

    @staticmethod
    def _inner(match: Match) -> tuple[Axis, ...]:
        """Return the axes of one expert's tensor."""
        return match.row.axes if match.expert is not None else match.row.axes[1:]

    def _narrow(self, tensor: Tensor, axes: Sequence[Axis]) -> Tensor:
        """Return kept channels of a tensor."""
        if self._channels is None:
            return tensor
        for dim, axis in enumerate(axes):
            if axis is Axis.RESIDUAL:
                tensor = taken(tensor, dim, self._channels)
            elif axis is Axis.TWO_RESIDUALS:
                second = self._channels + tensor.shape[dim] // 2
                tensor = taken(tensor, dim, torch.cat([self._channels, second]))
        return tensor

    def _whole(self, match: Match, experts: Experts) -> Tensor:
        """Return what is kept of a tensor that no experts are averaged in."""
        tensor, row = self._narrow(self._read(match), match.row.axes), match.row
        if Axis.EXPERT in row.axes and len(experts.kept) < tensor.shape[0]:
            tensor = tensor[experts.kept]
        factor = self.plan.norms.get(match.site) if row.norm is not None else None
        if factor is not None and self.moment:
            # gradients of what is multiplied by c are 1 / c of those before
            tensor = tensor / factor**self.moment
        elif factor is not None:
            assert row.norm is not None
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            tensor = ((wide + row.norm) * factor - row.norm).to(tensor.dtype)
        return tensor

    @staticmethod
    def _chosen(tensor: Tensor, axes: Sequence[Axis], neurons: Tensor) -> Tensor:
        """Return an expert's tensor with some of its neurons, or all in another order."""
        for dim, axis in enumerate(axes):
            half = tensor.shape[dim] // 2
            index = {
                Axis.NEURON: lambda: neurons,
                Axis.GATE_UP: lambda half=half: torch.cat([neurons, neurons + half]),
                Axis.GATE_UP_IN_TURNS: lambda: torch.stack([2 * neurons, 2 * neurons + 1], 1),
            }.get(axis)
            if index is not None:
                tensor = taken(tensor, dim, index().flatten())
        return tensor

    # --- the order of neurons --------------------------------------------------------------------

    def _order(self, place: int, base: int, member: int) -> Tensor:
        """Return the order of an expert's neurons that is most like the base's."""
        if self.aligned is not None:
            return self.aligned._order(place, base, member)
        if self._ordered != place:
            # each layer's are asked for one after the other
            self._orders.clear()
            self._ordered = place
        if (base, member) not in self._orders:
            matrices = [
                match
                for match in self.source.at(place)
                if match.expert in (None, base) and len(self._rows(match)) == 2
            ]
            matrices.sort(key=lambda match: self._rows(match)[0] is not Axis.RESIDUAL)
            both = [
                [part for match in matrices for part in self._by_neuron(match, expert)]
                for expert in (base, member)
            ]
            self._orders[base, member] = alignment(*both)
        return self._orders[base, member]

    def _rows(self, match: Match) -> tuple[Axis, ...]:
        """Return the axes of a routed expert's matrix; none of other tensors."""
        known = (Axis.NEURON, Axis.GATE_UP, Axis.GATE_UP_IN_TURNS)
        inner = self._inner(match)
        return inner if any(axis in known for axis in inner) else ()

    def _by_neuron(self, match: Match, expert: int) -> list[Tensor]:
        """Return a matrix of an expert as ``(I, ...)``, or gates and what they multiply apart."""
        tensor, axes = self._of(match, expert), self._inner(match)
        if axes[0] is Axis.RESIDUAL:
            tensor, axes = tensor.T, axes[::-1]
        if axes[0] is Axis.GATE_UP:
            return list(tensor.chunk(2))
        if axes[0] is Axis.GATE_UP_IN_TURNS:
            return [tensor[::2], tensor[1::2]]
        return [tensor]
