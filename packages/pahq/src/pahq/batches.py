"""How many removals are tried at once, and how the search went."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pahq.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

#: What a batch takes on a CPU beside its rows, in rows.
_OVERHEAD = 8
_LOG = logging.getLogger(__name__)


@dataclass
class Search:
    """How a search went.

    Attributes:
        value: The metric of the circuit.
        tested: Edges that were tried.
        skipped: Edges removed because nothing reads what they reach, or with all of their head's.
        kept: Edges that stayed.
        batches: Forward passes over what follows a receiver.
        rows: In all of them.
        checked: Edges that were tried again in high precision.
        effects: By edge ``(sender, receiver)``, what its removal added to the metric when it was
            tried.
        direct: By receiver, what the removal of all its edges at once added.
    """

    value: float = 0.0
    tested: int = 0
    skipped: int = 0
    kept: int = 0
    batches: int = 0
    rows: int = 0
    checked: int = 0
    effects: dict[tuple[int, int], float] = field(default_factory=dict)
    direct: dict[int, float] = field(default_factory=dict)


@dataclass
class Settings:
    """How much is done at once, and how precisely.

    Attributes:
        rows: Of a batch at most.
        precision: One of `pahq.precision.PRECISIONS`, or of `pahq.rounding.ROUNDED`.
        budget: Bytes that rows may take.
    """

    rows: int = 64
    precision: str = "fp32"
    budget: int = 2 << 30


def budget_of(device: torch.device) -> int:
    """Return how many bytes rows may take on a device if nothing else is said."""
    if device.type != "cuda":
        return 2 << 30
    return torch.cuda.mem_get_info(device)[0] // 2


class Batches:
    """Judges rows, as many at a time as fit into memory.

    Args:
        settings: Of batches.
        found: Told of batches and rows.
    """

    def __init__(self, settings: Settings, found: Search) -> None:
        self.most, self.budget, self.found = settings.rows, settings.budget, found
        self.ranks = Ranks()
        self.anew()

    def anew(self) -> None:
        """Forget how batches went: each layer has as many as it would in a search of its own."""
        self._decided, self._wrong = 64.0, 1.0

    def went(self, decided: int, wrong: bool) -> None:
        """Note how many edges a batch decided, and whether a wrong guess ended it."""
        self._decided = 0.9 * self._decided + decided
        self._wrong = 0.9 * self._wrong + wrong

    def worth(self) -> int:
        """Return how many rows of a batch are worth their time where it grows with them.

        Of R rows, those behind the first wrong guess are for nothing. If one in w guesses is wrong,
        and a batch takes as long as c rows more than it has, ``sqrt(2 c w)`` rows take the least
        time for each edge, to first order.
        """
        return max(1, round((2 * _OVERHEAD * self._decided / max(self._wrong, 0.01)) ** 0.5))

    def caught(
        self, judge: Callable[[slice], Tensor], names: Sequence[str], like: Tensor
    ) -> tuple[list[float], list[float]] | None:
        """Return the metric of rows and how far it may be off; None where fewer rows will fit.

        Args:
            judge: Of some rows it returns both, ``(2, m)``, or more than m: those of this process.
            names: Of what M rows remove, for an error.
            like: Of the dtype and on the device of the metric.

        Raises:
            FloatingPointError: The metric is not finite.
            MemoryError: Not even one row fits.
        """
        count, mine = len(names), self.ranks.share(len(names))
        found, failed = None, None
        try:
            found = judge(mine) if mine.start < mine.stop else like.new_zeros(2, 0)
        except torch.OutOfMemoryError as error:
            # without the frames, which would hold what was there
            failed, found = error.with_traceback(None), None
        found = self.ranks.gather(found, count, like)
        if found is None:
            if count <= self.ranks.count:
                raise MemoryError(
                    "one row does not fit into memory; give fewer or shorter examples"
                ) from failed
            self.most = -(-count // self.ranks.count) // 2
            _LOG.warning("out of memory with %d rows: goes on with %d rows", count, self.most)
            self.freed()
            return None
        values, doubt = found[:, :count].tolist()
        for value, name in zip(values, names, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"metric: {value} without {name}")
        self.found.batches += 1
        self.found.rows += count
        return values, doubt

    def freed(self) -> None:
        """Give back memory that nothing uses."""
        torch.cuda.empty_cache()
