"""Samples divided among slots so that the fullest slot has little to do: ``P || C_max``."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

#: Slots up to which `fptas` is exact within epsilon; its states grow with their power.
FPTAS_SLOTS = 3
#: Most rounded load vectors that `balanced` lets it keep.
FPTAS_STATES = 200_000
_BISECTIONS = 30


def list_schedule(order: list[int], lengths: np.ndarray, slots: int) -> list[list[int]]:
    """Give each sample, in order, to the slot that is free first."""
    found: list[list[int]] = [[] for _ in range(slots)]
    loads = [(0.0, slot) for slot in range(slots)]
    for sample in order:
        load, slot = heapq.heappop(loads)
        found[slot].append(sample)
        heapq.heappush(loads, (load + float(lengths[sample]), slot))
    return found


def longest_first(lengths: np.ndarray) -> list[int]:
    """Return samples from the longest down; those alike as they come."""
    return np.argsort(-np.asarray(lengths, dtype=np.float64), kind="stable").tolist()


def load(chains: list[list[int]], lengths: np.ndarray) -> float:
    """Return what the fullest slot has to do."""
    return max((float(lengths[chain].sum()) for chain in chains), default=0.0)


def fptas(lengths: np.ndarray, slots: int, epsilon: float) -> list[list[int]]:
    """Return a partition at most ``1 + epsilon`` times the best (Sahni, 1976).

    Loads are rounded down to multiples of ``epsilon * bound / G``, so that a slot's error is at
    most ``epsilon * bound``, and all reachable sorted load vectors are kept.
    """
    count = len(lengths)
    values = np.asarray(lengths, dtype=np.float64)
    bound = max(values.max(initial=0.0), values.sum() / slots)
    unit = epsilon * bound / max(1, count) or 1.0
    # of each rounded vector of loads: where its samples are, as a linked list
    states: dict[tuple[int, ...], tuple[tuple[float, ...], Any]] = {
        (0,) * slots: ((0.0,) * slots, None)
    }
    best = load(multifit(values, slots), values)
    for sample in longest_first(values):
        reached: dict[tuple[int, ...], tuple[tuple[float, ...], Any]] = {}
        for loads, trail in states.values():
            for slot in range(slots):
                if slot and loads[slot] == loads[slot - 1]:
                    continue
                grown = loads[slot] + values[sample]
                if grown > best:
                    continue
                new = (*loads[:slot], grown, *loads[slot + 1 :])
                order = sorted(range(slots), key=new.__getitem__)
                vector = tuple(new[place] for place in order)
                key = tuple(int(value / unit) for value in vector)
                if key not in reached or max(reached[key][0]) > max(vector):
                    reached[key] = (vector, (trail, sample, slot, order))
        states = reached
    if not states:
        return multifit(values, slots)
    _, trail = min(states.values(), key=lambda state: max(state[0]))
    steps = []
    while trail is not None:
        trail, sample, slot, order = trail
        steps.append((sample, slot, order))
    chains: list[list[int]] = [[] for _ in range(slots)]
    for sample, slot, order in reversed(steps):
        chains[slot].append(sample)
        chains = [chains[place] for place in order]
    return chains


def multifit(lengths: np.ndarray, slots: int) -> list[list[int]]:
    """Return a partition at most ``13 / 11`` times the best (Coffman, Garey and Johnson, 1978).

    Bisects the height of the bins into which first fit decreasing gets all; never worse than
    longest first.
    """
    values = np.asarray(lengths, dtype=np.float64)
    order = longest_first(values)
    best = list_schedule(order, values, slots)
    low = max(values.max(initial=0.0), values.sum() / slots)
    high = load(best, values)
    for _ in range(_BISECTIONS):
        if high - low < 0.5:
            break
        height = (low + high) / 2
        packed = _first_fit(order, values, slots, height)
        if packed is None:
            low = height
        else:
            best, high = packed, load(packed, values)
    return best


def _first_fit(
    order: list[int], values: np.ndarray, slots: int, height: float
) -> list[list[int]] | None:
    found: list[list[int]] = [[] for _ in range(slots)]
    loads = np.zeros(slots)
    for sample in order:
        fits = np.flatnonzero(loads + values[sample] <= height + 1e-9)
        if not len(fits):
            return None
        found[fits[0]].append(sample)
        loads[fits[0]] += values[sample]
    return found


def balanced(lengths: np.ndarray, parts: int, epsilon: float = 0.1) -> list[list[int]]:
    """Divide samples into parts of much the same total, by the best method that is feasible.

    Up to `FPTAS_SLOTS` parts and `FPTAS_STATES` states `fptas`, else `multifit` with `improve`.
    Polynomial in the number of parts only the latter are: with parts in the input the problem is
    strongly NP-hard, and no FPTAS exists unless P = NP.
    """
    values = np.asarray(lengths, dtype=np.float64)
    if parts <= 1:
        return [longest_first(values)] if len(values) else []
    best = improve(multifit(values, parts), values)
    if parts <= FPTAS_SLOTS and (len(values) / epsilon) ** (parts - 1) <= FPTAS_STATES:
        best = min(best, fptas(values, parts, epsilon), key=lambda found: load(found, values))
    return best


def sorted_rounds(lengths: np.ndarray, slots: int) -> list[list[int]]:
    """Return rounds of ``slots`` samples whose sum of maxima is the least there is.

    From the longest down, ``slots`` at a time: exchanging two samples of different rounds cannot
    lower it.
    """
    found = longest_first(lengths)
    return [found[low : low + slots] for low in range(0, len(found), slots)]


def improve(chains: list[list[int]], lengths: np.ndarray) -> list[list[int]]:
    """Move samples out of the fullest slot, or exchange them, as long as that lowers it."""
    values = np.asarray(lengths, dtype=np.float64)
    chains = [list(chain) for chain in chains]
    loads = np.array([values[chain].sum() for chain in chains])
    while len(chains) > 1:
        full = int(loads.argmax())
        best = None
        for other in range(len(chains)):
            if other == full:
                continue
            gap = loads[full] - loads[other]
            for mine in chains[full]:
                for theirs in (None, *chains[other]):
                    shift = values[mine] - (0.0 if theirs is None else values[theirs])
                    # the higher of the two after it
                    after = max(loads[full] - shift, loads[other] + shift)
                    if 0 < shift < gap and (best is None or after < best[0]):
                        best = (after, other, mine, theirs, shift)
        if best is None:
            return chains
        _, other, mine, theirs, shift = best
        chains[full].remove(mine)
        chains[other].append(mine)
        if theirs is not None:
            chains[other].remove(theirs)
            chains[full].append(theirs)
        loads[full] -= shift
        loads[other] += shift
    return chains
