"""Which sample goes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from shared_kernels._checks import check_choice, check_range, message

from infsampling.scheduling import bounds, partition

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

#: Orders in which waiting samples take free slots.
ORDERS: Final = ("lpt", "fifo", "sjf", "group_sjf", "paper")
#: Policies that also take samples out of slots and park their keys and values in host memory.
PARKING: Final = ("lrpt", "turns")
POLICIES: Final = (*ORDERS, *PARKING)


def check_lengths(name: str, lengths: ArrayLike) -> np.ndarray:
    """Return lengths as float64 ``(G,)``.

    Raises:
        ValueError: Not one-dimensional, negative, or not a number.
    """
    found = np.asarray(lengths, dtype=np.float64)
    if found.ndim != 1 or not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(
            message(name, "numbers of at least 0, one per sample", lengths, "see them")
        )
    return found


def order(
    predictions: ArrayLike,
    slots: int,
    policy: str = "lpt",
    *,
    groups: ArrayLike | None = None,
    epsilon: float = 0.1,
) -> list[int]:
    """Return the samples in the order in which they take free slots.

    - ``lpt``: the longest prediction first, what a synchronous training step wants: it waits for
      the last sample (Graham, 1969).
    - ``fifo``: as they come.
    - ``sjf``: the shortest prediction first, what the mean completion time wants.
    - ``group_sjf``: groups with little to do first, so that their rewards can begin; inside a
      group the longest first.
    - ``paper``: micro groups of balanced total length, one after the other, and inside a group the
      shortest first (arXiv:2506.22950: an FPTAS before decoding, SJF as slots become free). The
      paper's text leaves open how the two combine; this reading keeps both.
    - ``lrpt`` and ``turns`` begin as ``lpt`` and ``fifo``.

    Args:
        predictions: float ``(G,)``, expected tokens of each sample.
        slots: S.
        policy: One of the above.
        groups: int ``(G,)``, the prompt of each sample; one prompt by default.
        epsilon: Of `partition.fptas`, for ``paper``.

    Raises:
        ValueError: An unknown policy, no slots, or predictions that are no lengths.
    """
    check_choice("policy", policy, POLICIES)
    check_range("slots", slots, 1, 1 << 31, "a slot holds one sample")
    values = check_lengths("predictions", predictions)
    if policy in ("fifo", "turns"):
        return list(range(len(values)))
    if policy in ("lpt", "lrpt"):
        return partition.longest_first(values)
    if policy == "sjf":
        return partition.longest_first(-values)
    if policy == "group_sjf":
        owner = np.zeros(len(values), dtype=np.int64) if groups is None else np.asarray(groups)
        totals = {group: float(values[owner == group].sum()) for group in dict.fromkeys(owner)}
        rank = {group: place for place, group in enumerate(sorted(totals, key=totals.__getitem__))}
        return sorted(range(len(values)), key=lambda row: (rank[owner[row]], -values[row]))
    parts = partition.balanced(values, -(-len(values) // slots), epsilon)
    return [row for part in parts for row in sorted(part, key=values.__getitem__)]


@dataclass(frozen=True)
class Schedule:
    """A plan for samples of predicted lengths.

    Attributes:
        order: Samples as they take free slots.
        chains: Of each slot the samples that it would decode.
        makespan: Steps until the last is done, if the predictions were right.
        certificate: ``makespan / lower_bound - 1``: no schedule is shorter by more than that.
    """

    order: list[int]
    chains: list[list[int]]
    makespan: float
    certificate: float


def schedule(
    predictions: ArrayLike,
    slots: int,
    policy: str = "lpt",
    *,
    groups: ArrayLike | None = None,
    epsilon: float = 0.1,
) -> Schedule:
    """Plan which slot decodes what, and say how far from the best any plan could be.

    ``lpt`` takes the better of list scheduling, MULTIFIT with exchanges and, for up to
    `partition.FPTAS_SLOTS` slots, the FPTAS; other policies are list schedules of their order.
    Arguments and errors as in `order`; policies that park are planned as their first order.
    """
    found = order(predictions, slots, policy, groups=groups, epsilon=epsilon)
    values = check_lengths("predictions", predictions)
    chains = partition.list_schedule(found, values, slots)
    if policy == "lpt":
        other = partition.balanced(values, slots, epsilon)
        if partition.load(other, values) < partition.load(chains, values):
            chains = other
    makespan = partition.load(chains, values)
    bound = bounds.lower_bound(np.ceil(values), slots)
    # lengths that are no integers may end within the last step
    bound = min(float(bound), makespan) if makespan else 1.0
    return Schedule(found, chains, makespan, makespan / bound - 1 if makespan else 0.0)
