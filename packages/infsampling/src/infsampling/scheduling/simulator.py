"""What a policy makes of lengths that it does not know: steps, slots in use, swaps."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from shared_kernels._checks import check_choice, check_range, message

from infsampling.scheduling import bounds, parking, partition, policies

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

#: Of `simulate`: all policies, and rounds that wait for their longest sample.
SIMULATED: Final = (*policies.POLICIES, "rounds", "sorted_rounds")


@dataclass(frozen=True)
class SimResult:
    """What happened.

    Attributes:
        steps: Forward passes until the last sample was done.
        lower_bound: That no schedule can do without; with parking `bounds.preemptive_bound`.
        utilisation: The share of slot steps that made a token.
        swaps: How often a sample was taken out of its slot.
        ends: int ``(G,)``, the step after which each sample was done.
    """

    steps: int
    lower_bound: int
    utilisation: float
    swaps: int
    ends: np.ndarray

    @property
    def over_bound(self) -> float:
        """Steps over the lower bound; 1 is the best there is."""
        return self.steps / self.lower_bound if self.lower_bound else 1.0


def simulate(
    lengths: ArrayLike,
    slots: int,
    policy: str = "lpt",
    predictions: ArrayLike | None = None,
    *,
    groups: ArrayLike | None = None,
    sync_every: int = 16,
    rerank_every: int = 64,
    turn: int = 64,
    park_limit: float = 2.0,
    probe: int = 0,
    remaining: Callable[[int, int], float] | None = None,
    epsilon: float = 0.1,
) -> SimResult:
    """Decode samples of given lengths on slots, as `InfiniteSampler` does under forced lengths.

    Args:
        lengths: int ``(G,)``, steps that each sample takes. The first token of a sample comes from
            its prompt, so a sample of n tokens takes n - 1.
        slots: S.
        policy: One of `SIMULATED`. ``rounds`` fills all slots and waits for the longest (the
            paper's micro sampling groups), ``sorted_rounds`` does so from the longest down.
        predictions: float ``(G,)``, what the policy believes; the lengths by default.
        groups: int ``(G,)``, the prompt of each sample.
        sync_every: Steps between two looks of the host, for policies that park.
        rerank_every: Steps between two rankings of all samples, a multiple of ``sync_every``.
        turn: Steps after which ``turns`` lets another sample go first.
        park_limit: As in `SamplingConfig`.
        probe: Steps that all samples have before ``lpt`` orders them by what remains, if
            `parking.worth_probing`; 0 orders them by their predictions.
        remaining: Of a sample and the steps it has had, what is believed to remain, for policies
            that park and for ``lpt`` with a probe; by default what is left of its prediction.
        epsilon: As in `policies.order`.

    Raises:
        ValueError: An unknown policy, no slots, or lengths that are none.
    """
    check_choice("policy", policy, SIMULATED)
    check_range("slots", slots, 1, 1 << 31, "a slot holds one sample")
    work = policies.check_lengths("lengths", lengths).astype(np.int64)
    believed = policies.check_lengths("predictions", work if predictions is None else predictions)
    if len(believed) != len(work):
        raise ValueError(message("predictions", f"{len(work)} numbers", believed, "one per sample"))
    if policy in ("rounds", "sorted_rounds"):
        rows = list(range(len(work)))
        rounds = [rows[low : low + slots] for low in range(0, len(rows), slots)]
        if policy == "sorted_rounds":
            rounds = partition.sorted_rounds(believed, slots)
        ends, clock = np.zeros_like(work), 0
        for part in rounds:
            ends[part] = clock + work[part]
            clock += int(work[part].max(initial=0))
        return _result(work, slots, ends, clock, 0, bounds.lower_bound(work, slots))
    found = policies.order(believed, slots, policy, groups=groups, epsilon=epsilon)
    # a sample that ends with its first token never takes a slot
    found = [row for row in found if work[row]]
    probing = policy == "lpt" and parking.worth_probing(believed[found], slots, probe)
    if policy in policies.PARKING or probing:
        plan = parking.Ranking(
            policy, believed, turn=turn, limit=park_limit, probe=probe, remaining=remaining,
            margin=rerank_every / 2,
        )  # fmt: skip
        ends, swaps = _park(work, slots, found, plan, sync_every, rerank_every)
        clock = int(ends.max(initial=0))
        return _result(work, slots, ends, clock, swaps, bounds.preemptive_bound(work, slots))
    ends = np.zeros_like(work)
    free = [(0, slot) for slot in range(slots)]
    for row in found:
        clock, slot = heapq.heappop(free)
        ends[row] = clock + work[row]
        heapq.heappush(free, (int(ends[row]), slot))
    clock = int(ends.max(initial=0))
    return _result(work, slots, ends, clock, 0, bounds.lower_bound(work, slots))


def _result(
    work: np.ndarray, slots: int, ends: np.ndarray, steps: int, swaps: int, bound: int
) -> SimResult:
    used = float(work.sum()) / (steps * slots) if steps else 1.0
    return SimResult(steps, bound, used, swaps, ends)


def _park(
    work: np.ndarray,
    slots: int,
    order: list[int],
    plan: parking.Ranking,
    sync_every: int,
    rerank_every: int,
) -> tuple[np.ndarray, int]:
    """Step by step: the device fills free slots with fresh samples, the host all else."""
    done = np.zeros_like(work)
    ends = np.zeros_like(work)
    fresh, held, parked = list(order), [-1] * slots, []
    clock = swaps = 0
    while fresh or parked or any(row >= 0 for row in held):
        if clock % sync_every == 0:
            full = plan.due(clock, rerank_every)
            out, into = plan.choose(held, parked, fresh, done, full=full)
            swaps += len(out)
            for slot in out:
                parked.append(held[slot])
                held[slot] = -1
            for slot, row in into:
                held[slot] = row
                (parked if row in parked else fresh).remove(row)
        for slot in range(slots):
            if held[slot] < 0 and fresh:
                held[slot] = fresh.pop(0)
        clock += 1
        for slot, row in enumerate(held):
            if row >= 0:
                done[row] += 1
                if done[row] == work[row]:
                    ends[row] = clock
                    held[slot] = -1
        # the device gives the slots away within the same step
        for slot in range(slots):
            if held[slot] < 0 and fresh:
                held[slot] = fresh.pop(0)
    return ends, swaps
