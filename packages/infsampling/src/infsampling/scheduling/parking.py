"""Which samples run and which wait, for policies that take samples out of slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Ranking:
    """Ranks samples by what remains of them, or by what they have had.

    - ``lrpt``: the longest remaining prediction first. With right predictions, and ranked at every
      step, it takes as few steps as there can be (McNaughton, 1959; Muntz and Coffman, 1969).
    - ``turns``: who had fewer turns first. It needs no predictions: samples that end early do so
      early, and the long ones run side by side at the end.

    Args:
        policy: ``lrpt`` or ``turns``.
        predictions: float ``(G,)``, expected steps.
        turn: Steps of a turn.
        remaining: Of a sample and its steps so far, the steps it is believed to need yet.
        margin: By how many steps a waiting sample must be longer than a running one to take its
            place, for ``lrpt``: a swap costs a copy, and samples that are ranked seldom need not be
            told apart finely.
    """

    def __init__(
        self,
        policy: str,
        predictions: np.ndarray,
        *,
        turn: int,
        remaining: Callable[[int, int], float] | None = None,
        margin: float = 0.0,
    ) -> None:
        self.policy, self.predictions = policy, np.asarray(predictions, dtype=np.float64)
        self.turn, self.margin = turn, margin
        self._remaining = remaining

    def priority(self, row: int, done: int) -> float:
        """Return how urgent a sample is."""
        if self.policy == "turns":
            return -float(done // self.turn)
        if self._remaining is not None:
            return self._remaining(row, done)
        # who has outlived its prediction is believed to need as much again as it went over it
        return max(self.predictions[row] - done, 0.5 * (done - self.predictions[row]), 1.0)

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
                the first ones first.
            done: int ``(G,)``, steps that each sample has had.
            full: Whether running samples may be taken out; else only free slots are filled.

        Returns:
            Slots to empty; and pairs of a slot and the sample to put there.
        """
        rank = lambda row: self.priority(row, int(done[row]))  # noqa: E731
        waiting = sorted([*parked, *fresh], key=rank, reverse=True)
        free = [slot for slot, row in enumerate(held) if row < 0]
        into, out = list(zip(free, waiting, strict=False)), []
        waiting = waiting[len(into) :]
        if full and waiting:
            running = sorted((slot for slot, row in enumerate(held) if row >= 0),
                             key=lambda slot: rank(held[slot]))  # fmt: skip
            margin = 0.0 if self.policy == "turns" else self.margin
            for slot in running:
                if not waiting or rank(waiting[0]) <= rank(held[slot]) + margin:
                    break
                out.append(slot)
                into.append((slot, waiting.pop(0)))
        return out, into
