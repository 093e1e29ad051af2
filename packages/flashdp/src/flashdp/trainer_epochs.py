"""A Poisson loader as a trainer wants it: an epoch at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flashdp.loader import PoissonDataLoader

__all__ = ["Epochs", "steps_for"]


class Epochs:
    """The batches of a run, an epoch at a time."""

    def __init__(self, loader: PoissonDataLoader) -> None:
        self.dataset, self._poisson = loader.dataset, loader
        self.steps = min(steps_for(1, loader.sample_rate), loader.num_steps)
        self.batches_per_step = loader.physical_batches_per_step or 1
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.steps * self.batches_per_step

    def __iter__(self) -> Iterator[Any]:
        # One iterator for all epochs: its workers have drawn ahead.
        self._batches = self._batches or iter(self._poisson)
        end = (self._poisson.steps_done // self.steps + 1) * self.steps
        while self._poisson.steps_done < end:
            batch = next(self._batches, None)
            if batch is None:
                return
            yield batch


def steps_for(epochs: float, sample_rate: float) -> int:
    """Return the steps in which a unit is drawn ``epochs`` times on average, rounded up."""
    # 3.0000000001 is 3.
    return max(1, math.ceil(epochs / sample_rate - 1e-9))
