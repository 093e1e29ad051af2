"""Bins of answer lengths, and soft labels over them.

A length counts the tokens of an answer, its end-of-sequence token included, so it is at least 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from shared_kernels._checks import check_range, message
from torch import Tensor

#: Steps of Newton's method that find a label's tilt to rounding.
_STEPS = 60


@dataclass(frozen=True)
class Bins:
    """Adjoining intervals ``(edge_j, edge_j+1]`` of lengths.

    Attributes:
        edges: K + 1 numbers, or K with an open last bin, strictly increasing.
        tail: Mean excess over the last edge in an open last bin, whose excess is geometric; None
            if the last bin is closed.
        integers: A bin is uniform over the integers in it, all edges being integers; otherwise it
            is uniform over its reals.
    """

    edges: tuple[float, ...]
    tail: float | None = None
    integers: bool = True

    def __post_init__(self) -> None:
        edges = self.edges
        if len(self) < 2 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(
                message("edges", "at least two bins, strictly increasing", edges, "sort them")
            )
        if self.integers and any(edge != int(edge) for edge in edges):
            raise ValueError(message("edges", "integers", edges, "round them"))
        if self.tail is not None and not (self.tail > 1 and math.isfinite(self.tail)):
            raise ValueError(message("tail", "a mean excess above 1", self.tail, "leave it out"))

    def __len__(self) -> int:
        return len(self.edges) - (self.tail is None)

    @classmethod
    def log1p(cls, count: int, longest: int, *, tail: float | None = None) -> Bins:
        """Make bins whose edges are even in log1p, rounded to integers, with an open last one.

        Neighbouring edges differ by at least one, so there may be fewer bins than asked for.

        Args:
            count: Bins, the open one included.
            longest: The last edge; longer answers fall into the open bin.
            tail: Mean excess over it; by default a quarter of it.

        Raises:
            ValueError: Fewer than two bins, or a last edge that leaves no room for them.
        """
        check_range("count", count, 3, 1 << 16, "64 are enough for most")
        check_range("longest", longest, 2, 1 << 31, "the longest answers that were seen")
        raw = np.expm1(np.linspace(0, math.log1p(longest), count))
        edges = [0]
        for edge in raw[1:]:
            edges.append(max(edges[-1] + 1, round(float(edge))))
        edges = [edge for edge in edges if edge < longest] + [longest]
        return cls(tuple(map(float, edges)), max(2.0, longest / 4) if tail is None else tail)

    @classmethod
    def linear(cls, count: int, low: float, high: float) -> Bins:
        """Make bins of one width over a range of reals, as the paper does (arXiv:2602.11812).

        Raises:
            ValueError: Fewer than two bins, or an empty range.
        """
        check_range("count", count, 2, 1 << 16, "the paper takes 20")
        if not low < high:
            raise ValueError(message("low", f"a number below {high}", low, "swap them"))
        return cls(tuple(np.linspace(low, high, count + 1).tolist()), integers=False)

    @classmethod
    def fit(cls, lengths: Tensor, count: int = 64, *, scale: str = "log1p") -> Bins:
        """Make bins for training lengths: up to their 99th percentile, the longer ones in the tail.

        Args:
            lengths: Of answers that ended.
            count: Bins.
            scale: ``log1p``, or ``linear``: the paper's, from the 1st to the 99th percentile.

        Raises:
            ValueError: No lengths, or an unknown scale.
        """
        values = lengths.double().flatten()
        if not len(values):
            raise ValueError(message("lengths", "at least one", lengths, "collect answers first"))
        low, high = values.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
        if scale == "linear":
            return cls.linear(count, low, max(high, low + count))
        if scale != "log1p":
            raise ValueError(message("scale", "log1p or linear", scale, "pick one of these"))
        last = max(4, math.ceil(high))
        beyond = values[values > last] - last
        tail = float(beyond.mean()) if len(beyond) else 0.0
        return cls.log1p(count, last, tail=max(2.0, last / 16, tail))

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {"edges": list(self.edges), "tail": self.tail, "integers": self.integers}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Bins:
        """Make bins of what `to_dict` returned."""
        return cls(tuple(map(float, found["edges"])), found["tail"], bool(found["integers"]))

    def closed_edges(self) -> Tensor:
        """Return the finite edges, float64."""
        return torch.tensor(self.edges, dtype=torch.float64)

    def centers(self) -> Tensor:
        """Return the mean length of each bin, float64 ``(K,)``."""
        edges = self.closed_edges()
        middle = (edges[:-1] + edges[1:] + (1 if self.integers else 0)) / 2
        if self.tail is None:
            return middle
        return torch.cat([middle, edges[-1:] + self.tail])

    def index(self, lengths: Tensor) -> Tensor:
        """Return the bin of each length, int64; lengths beyond the ends belong to the end bins."""
        inner = self.closed_edges()[1 : len(self)].to(lengths.device)
        return torch.bucketize(lengths.double(), inner)

    def below(self, lengths: Tensor) -> Tensor:
        """Return how much of each bin lies at or below each length, float64 ``(..., K)``.

        ``P(L <= x)`` is the product of this with the bins' probabilities.
        """
        edges = self.closed_edges().to(lengths.device)
        x = lengths.double().unsqueeze(-1)
        if self.integers:
            x = x.floor()
        part = ((x - edges[:-1]) / edges.diff()).clamp(0, 1)
        if self.tail is None:
            return part
        ratio = 1 - 1 / self.tail
        beyond = 1 - ratio ** (x - edges[-1]).clamp(min=0)
        return torch.cat([part, beyond], -1)

    def remaining(self, pmf: Tensor, seen: Tensor, edges: Tensor | None = None) -> Tensor:
        """Return the distribution over the bins of what remains of answers longer than ``seen``.

        ``P(edge_j < L - seen <= edge_j+1 | L > seen)``, a millionth of it even, so that nothing is
        impossible.

        Args:
            pmf: float ``(N, K)``, of lengths L.
            seen: ``(N,)``, tokens that came.
            edges: `closed_edges` in the dtype and on the device of ``pmf``, if they are at hand.

        Returns:
            ``(N, K)`` in the dtype of ``pmf``.
        """
        edges = self.closed_edges().to(pmf) if edges is None else edges
        x = edges[: len(self)] + seen.to(pmf)[:, None]
        place = torch.searchsorted(edges, x, right=True).clamp(max=len(edges) - 1) - 1
        high, width = edges[1:][place], edges.diff()[place]
        from_here = pmf.flip(-1).cumsum(-1).flip(-1)
        after = torch.cat([from_here[:, 1:], torch.zeros_like(pmf[:, :1])], -1)
        share = ((high - x) / width).clamp(0, 1)
        longer = after.gather(1, place) + share * pmf.gather(1, place)
        beyond = torch.zeros_like(longer)
        if self.tail is not None:
            beyond = pmf[:, -1:] * (1 - 1 / self.tail) ** (x - edges[-1]).clamp(min=0)
        longer = torch.where(x >= edges[-1], beyond, longer)
        inside = longer - torch.cat([longer[:, 1:], torch.zeros_like(longer[:, :1])], -1)
        inside = inside.clamp(min=0) / longer[:, :1].clamp(min=1e-30) + 1e-6 / len(self)
        return inside / inside.sum(-1, keepdim=True)

    def labels(self, lengths: Tensor) -> Tensor:
        """Return soft labels float64 ``(..., K)`` whose mean is the length exactly.

        The length is shared between the two nearest centres, spread by the kernel
        ``e^-|shift|`` over bins, and tilted by ``e^(a c_j)`` until the mean is right, which is the
        nearest distribution by relative entropy that has this mean. Lengths beyond the outer
        centres are put there.
        """
        centers = self.centers().to(lengths.device)
        y = lengths.double().clamp(float(centers[0]), float(centers[-1])).unsqueeze(-1)
        right = torch.bucketize(y, centers[1:-1]) + 1
        low, high = centers[right - 1], centers[right]
        share = (y - low) / (high - low)
        places = torch.arange(len(self), device=lengths.device)
        log_kernel = torch.logaddexp(
            (1 - share).log() - (places - right + 1).abs(), share.log() - (places - right).abs()
        )
        return _tilted(log_kernel, centers, y)

    def paper_labels(self, lengths: Tensor) -> Tensor:
        """Return the paper's soft labels ``e^-|j - i| / sum_k e^-|k - i|``, float64 ``(..., K)``.

        Their mean is not the length at the outer bins: at the first of many it lies 0.582 bins
        further in.
        """
        distance = torch.arange(len(self), device=lengths.device) - self.index(lengths)[..., None]
        return torch.softmax(-distance.abs().double(), -1)


def _tilted(log_weights: Tensor, centers: Tensor, mean: Tensor) -> Tensor:
    """Return ``softmax(log_weights + a centers)`` with ``a`` such that its mean is ``mean``."""
    spread = centers[-1] - centers[0]
    unit = (centers - centers[0]) / spread
    goal = (mean - centers[0]) / spread
    low, high = torch.full_like(goal, -1e4), torch.full_like(goal, 1e4)
    tilt = torch.zeros_like(goal)
    for _ in range(_STEPS):
        weights = torch.softmax(log_weights + tilt * unit, -1)
        found = (weights * unit).sum(-1, keepdim=True)
        variance = (weights * (unit - found) ** 2).sum(-1, keepdim=True)
        # the mean grows with the tilt: Newton's step where it stays inside, else the middle
        low, high = torch.where(found < goal, tilt, low), torch.where(found < goal, high, tilt)
        step = tilt + (goal - found) / variance.clamp(min=1e-300)
        tilt = torch.where((step > low) & (step < high), step, (low + high) / 2)
    weights = torch.softmax(log_weights + tilt * unit, -1)
    # at the ends no finite tilt is enough
    ends = torch.zeros_like(weights)
    ends[..., 0], ends[..., -1] = (goal[..., 0] <= 0).double(), (goal[..., 0] >= 1).double()
    return torch.where((goal <= 0) | (goal >= 1), ends, weights)
