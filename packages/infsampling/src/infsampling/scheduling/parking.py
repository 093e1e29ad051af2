"""Which samples run and which wait, for policies that take samples out of slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Of the steps that are expected, the largest share that a probe may take.
PROBE_SHARE = 0.25


def left(prediction: float, done: int) -> float:
    """Return how many steps are believed to be left of a predicted number, after some.

    Who has outlived its prediction is believed to need as much again as it went over it.
    """
    return max(prediction - done, 0.5 * (done - prediction), 1.0)


def worth_probing(predictions: np.ndarray, slots: int, probe: int) -> bool:
    """Return whether all samples should have ``probe`` steps before any has more.

    Not if there is a slot for each, nor if that takes long beside the rest.

    Args:
        predictions: float ``(G,)``, expected steps of the samples that have any.
        slots: S.
        probe: Steps.
    """
    if probe < 1 or len(predictions) <= slots:
        return False
    expected = max(float(predictions.max()), float(predictions.sum()) / slots)
    return -(-len(predictions) // slots) * probe <= PROBE_SHARE * expected


class Ranking:
    """Ranks samples by what remains of them, or by what they have had.

    - ``lrpt``: the longest remaining prediction first. With right predictions, ranked at every step
      and without a limit, it takes as few steps as there can be (McNaughton, 1959; Muntz and
      Coffman, 1969).
    - ``turns``: who had fewer turns first. It needs no predictions: samples that end early do so
      early, and the long ones run side by side at the end.
    - ``lpt``: all have ``probe`` steps; then the longest remaining prediction first, once and for
      all: nothing that runs is taken out any more.

    Args:
        policy: ``lrpt``, ``turns`` or ``lpt``.
        predictions: float ``(G,)``, expected steps.
        turn: Steps of a turn.
        limit: Running samples are taken out once no more than this many times as many are left as
            there are slots. While more are left no slot is idle; swaps would spare a few steps
            more, for many times as many copies.
        probe: Steps that all samples have first, for ``lpt``; it ends when the host looks next.
        remaining: Of a sample and its steps so far, the steps it is believed to need yet.
        refresh: Called before samples are ranked by what remains.
        margin: By how many steps a waiting sample must be longer than a running one to take its
            place, for ``lrpt``: a swap costs a copy, and samples that are ranked seldom need not be
            told apart finely.
    """

    def __init__(
        self,
        policy: str,
        predictions: np.ndarray,
        *,
        turn: int = 1,
        limit: float = float("inf"),
        probe: int = 0,
        remaining: Callable[[int, int], float] | None = None,
        refresh: Callable[[], None] | None = None,
        margin: float = 0.0,
    ) -> None:
        self.policy, self.predictions = policy, np.asarray(predictions, dtype=np.float64)
        self.turn, self.probe, self.limit = turn, probe, limit
        self.margin = margin if policy == "lrpt" else 0.0
        self.probing = policy == "lpt"
        self._remaining, self._refresh = remaining, refresh

    def due(self, clock: int, every: int) -> bool:
        """Return whether running samples may be taken out, if they may every so many steps."""
        return self.probing if self.policy == "lpt" else clock % every == 0

    def priority(self, row: int, done: int) -> float:
        """Return how urgent a sample is."""
        if self.policy == "turns":
            return -float(done // self.turn)
        if self.probing and done < self.probe:
            return float("inf")
        if self._remaining is not None:
            return self._remaining(row, done)
        return left(self.predictions[row], done)

    def choose(
        self,
        held: Sequence[int],
        parked: Sequence[int],
        fresh: Sequence[int],
        done: np.ndarray,
        *,
        full: bool,
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Say which slots to empty, and which samples to put where.

        Args:
            held: Of each slot its sample, or -1.
            parked: Samples that have been taken out of a slot.
            fresh: Samples that have not begun, in order; the device gives them free slots itself,
                the first ones first, and needs no host for it.
            done: int ``(G,)``, steps that each sample has had.
            full: Whether running samples may be taken out, see `due`; else only free slots are
                filled.

        Returns:
            Slots to empty; and pairs of a slot and the sample to put there.
        """
        busy = [row for row in held if row >= 0]
        few = len(parked) + len(fresh) + len(busy) <= self.limit * len(held)
        full = full and (self.probing or few)
        if not full and not parked:
            return [], []
        alive = [*parked, *fresh, *busy]
        ranked = not self.probing or all(done[row] >= self.probe for row in alive)
        if full and ranked and self._refresh is not None:
            self._refresh()
        rank = lambda row: self.priority(row, int(done[row]))  # noqa: E731
        waiting = sorted([*parked, *fresh], key=rank, reverse=True)
        free = [slot for slot, row in enumerate(held) if row < 0]
        into, out = list(zip(free, waiting, strict=False)), []
        waiting = waiting[len(into) :]
        if full and waiting:
            running = sorted((slot for slot, row in enumerate(held) if row >= 0),
                             key=lambda slot: rank(held[slot]))  # fmt: skip
            # while some wait for their probe, it is only for them that others leave
            ready = waiting if ranked else [row for row in waiting if done[row] < self.probe]
            for slot in running:
                if not ready or rank(ready[0]) <= rank(held[slot]) + self.margin:
                    break
                out.append(slot)
                into.append((slot, ready.pop(0)))
        if full and ranked:
            self.probing = False
        return out, into
