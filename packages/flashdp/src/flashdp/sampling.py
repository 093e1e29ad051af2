"""Which units take part in a step, and how they are computed in batches that fit the memory.

Every unit enters every step independently with the same probability (Poisson sampling), which is
what the accountant's amplification assumes. A unit is a row of the data set, or a user with all of
the user's rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashdp._checks import check_rate, check_seed, check_whole
from flashdp.accounting import Mechanism

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    Indices = NDArray[np.int64]

_CHUNK = 1 << 17


@dataclass(frozen=True)
class RowBatch:
    """The rows computed at once.

    Attributes:
        indices: Rows of the data set, those of a unit following each other.
        offsets: int64 (units + 1,), rows before each unit.
        mask: bool (units,), False for padding, which must contribute nothing.
        first: Whether it opens a step.
        last: Whether it completes a step.
    """

    indices: Indices
    offsets: Indices
    mask: NDArray[np.bool_]
    first: bool
    last: bool


class PoissonSampler:
    """Draws the units of each step.

    Args:
        n_units: Number of units.
        sample_rate: Probability with which each enters a step, rounded down to 64 bits.
        steps: Number of steps.
        secure: Take random bits from the operating system's cryptographic generator; no two
            draws are the same then, also not of the same step.
        seed: For repeatable draws, with ``secure=False``: a draw is then a function of seed and
            step, from Philox.
        max_batch_size: Cap of a draw: a larger one is cut to a uniformly chosen subset.
        shard: Draw from every ``num_shards``-th unit only, from this one on. Draws of all shards
            together are draws from all units, but for the cap, which is each shard's own.
        num_shards: Number of shards.
    """

    def __init__(
        self,
        n_units: int,
        sample_rate: float,
        steps: int,
        *,
        secure: bool = True,
        seed: int | None = None,
        max_batch_size: int | None = None,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        check_whole("n_units", n_units)
        check_rate("sample_rate", sample_rate)
        check_whole("steps", steps)
        check_seed(seed, secure=secure)
        if max_batch_size is not None:
            check_whole("max_batch_size", max_batch_size)
        check_whole("num_shards", num_shards)
        if not 0 <= shard < num_shards:
            raise ValueError(f"shard: expected 0 to {num_shards - 1}, got {shard}")
        if n_units < num_shards:
            raise ValueError(f"{n_units} units cannot be shared by {num_shards} shards")
        self.shard = shard
        self.num_shards = num_shards
        self.n_units = n_units
        self.sample_rate = float(sample_rate)
        self.steps = steps
        self.secure = secure
        self.seed = seed
        self.max_batch_size = max_batch_size

    def __len__(self) -> int:
        """Return the number of steps."""
        return self.steps

    def __iter__(self) -> Iterator[Indices]:
        """Draw for every step in turn."""
        return map(self.draw, range(self.steps))

    def draw(self, step: int) -> Indices:
        """Return the units that take part in a step, in ascending order.

        Args:
            step: From 0.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"expected a step from 0 to {self.steps - 1}, got {step}")
        words = self._words(step, 0)
        threshold = int(self.sample_rate * 2.0**64)
        if threshold >= 2**64:
            drawn = np.arange(self._own_units)
        else:
            drawn = np.concatenate(
                [
                    start + np.flatnonzero(words(min(_CHUNK, self._own_units - start)) < threshold)
                    for start in range(0, self._own_units, _CHUNK)
                ]
            )
        if self.max_batch_size is not None:
            drawn = _subset(drawn, self.max_batch_size, words)
        return self.shard + self.num_shards * drawn.astype(np.int64)

    @property
    def _own_units(self) -> int:
        return len(range(self.shard, self.n_units, self.num_shards))

    @property
    def largest_shard(self) -> int:
        """Units of the largest shard."""
        return -(-self.n_units // self.num_shards)

    def rows_of(
        self, drawn: Indices, rows: Sequence[Indices], limit: int | None, step: int
    ) -> list[Indices]:
        """Return the rows that drawn users bring.

        Args:
            drawn: The users.
            rows: The rows of every user.
            limit: Rows per user at most; of more, a uniformly chosen subset is taken.
            step: The step drawn for.
        """
        words = self._words(step, 1)
        chosen = [rows[unit] for unit in drawn]
        return chosen if limit is None else [_subset(r, limit, words) for r in chosen]

    def mechanism(self, noise_multiplier: float) -> Mechanism:
        """Return what the accountant has to count for a step of this sampler and its fellows.

        A unit is seen in its own shard alone, whatever the others draw. A cap cuts most in the
        largest shard, which stands for all.

        Args:
            noise_multiplier: σ of the step's noise.
        """
        if self.max_batch_size is None:
            return Mechanism(noise_multiplier=noise_multiplier, sample_rate=self.sample_rate)
        return Mechanism(
            noise_multiplier=noise_multiplier,
            sample_rate=self.sample_rate,
            sampling="truncated",
            dataset_size=self.largest_shard,
            truncated_batch_size=self.max_batch_size,
        )

    def _words(self, step: int, stream: int) -> Any:
        """Return a function from a count to that many random 64-bit words."""
        if self.secure:
            return lambda count: np.frombuffer(os.urandom(8 * count), np.uint64)
        index = (2 * step + stream) * self.num_shards + self.shard
        generator = np.random.Philox(key=np.array([self.seed, index], np.uint64))
        return generator.random_raw


def group_rows(unit_ids: Iterable[Hashable]) -> list[Indices]:
    """Return the rows of each unit, units in the order in which they first appear.

    Args:
        unit_ids: Whose row it is, for every row.
    """
    found: dict[Hashable, list[int]] = {}
    for row, unit in enumerate(unit_ids):
        found.setdefault(unit, []).append(row)
    return [np.array(rows, np.int64) for rows in found.values()]


def physical_batches(
    rows: Sequence[Indices], size: int | None, *, count: int | None = None, filler: int = 0
) -> list[RowBatch]:
    """Split a draw into batches of a fixed number of rows.

    Units are packed in order; a batch is padded with masked units of one row. A step without any
    unit is one masked batch, because its noise is released too.

    Args:
        rows: Rows of each drawn unit.
        size: Rows of a batch; ``None`` puts the whole draw into one batch.
        count: Number of batches; ``None`` takes as many as are needed.
        filler: Row that pads batches without a unit; others repeat their own first row.

    Raises:
        ValueError: A unit has more rows than a batch, or the units need more batches than
            ``count``.
    """
    if size is not None:
        check_whole("size", size)
    if count is not None:
        check_whole("count", count)
    packed: list[list[Indices]] = [[]]
    used = 0
    for unit in rows:
        if size is not None and len(unit) > size:
            raise ValueError(
                f"a unit of {len(unit)} rows does not fit a physical batch of {size} rows, and a "
                "unit is never split: raise max_physical_batch_size or set max_rows_per_unit"
            )
        if size is not None and used + len(unit) > size:
            packed.append([])
            used = 0
        packed[-1].append(unit)
        used += len(unit)
    if count is not None:
        if len(packed) > count:
            raise ValueError(
                f"{len(rows)} unit(s) do not fit {count} physical batches of {size} rows: cap the "
                "draw with max_batch_size, or allow more batches"
            )
        packed += [[] for _ in range(count - len(packed))]
    return [
        _pad(units, size, filler, first=number == 0, last=number == len(packed) - 1)
        for number, units in enumerate(packed)
    ]


def _pad(
    units: list[Indices], size: int | None, filler: int, *, first: bool, last: bool
) -> RowBatch:
    lengths = [len(unit) for unit in units]
    total = sum(lengths)
    padding = (size or max(total, 1)) - total
    if units:
        filler = int(units[0][0])
    offsets = np.cumsum([0, *lengths, *[1] * padding])
    mask = np.arange(len(offsets) - 1) < len(units)
    indices = np.concatenate([*units, np.full(padding, filler)])
    return RowBatch(indices.astype(np.int64), offsets.astype(np.int64), mask, first, last)


def _subset(items: Indices, limit: int, words: Any) -> Indices:
    """Return at most ``limit`` of the items, every subset being as likely, in their order."""
    if len(items) <= limit:
        return items
    keys = words(len(items))
    return items[np.sort(np.argpartition(keys, limit)[:limit])]
