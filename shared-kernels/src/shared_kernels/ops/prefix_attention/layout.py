"""Which keys each packed row of queries sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared_kernels._checks import message

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Columns of a table of rows: queries, keys of the row's own, range of the shared keys; then for
#: each ancestor a start and a length.
QUERY, QUERIES, OWN, KEYS, SHARED, PREFIX, ANCESTORS = range(7)

Range = tuple[int, int]


class Tables(NamedTuple):
    """What a kernel reads, on one device.

    Attributes:
        rows: int32 ``(N, 6 + 2A)``, as `PrefixLayout.rows`.
        token_rows: int32 ``(T,)``, the row of each query.
        tiles: int32 ``(n, 2)``, first query and end of each tile. The rows of a tile differ in
            how much they see of a range, never in where it starts.
    """

    rows: Tensor
    token_rows: Tensor
    tiles: Tensor


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """Rows of queries laid end to end, and what each sees before it.

    The keys of a row, in the order of their positions: a range of the *shared* keys, ranges of
    the packed keys that belong to other rows (its *ancestors*), and the row's *own* keys, the
    last of which belongs to its last query. Queries see what stands at or before their position.

    Attributes:
        rows: int32 ``(N, 6 + 2A)`` on the CPU: first query and number of queries, start and
            length of the own keys, of the shared range, and of A ancestors (length 0 for none).
    """

    rows: Tensor
    _tables: dict[tuple[torch.device, int], Tables] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        *,
        shared: Range | Sequence[Range] = (0, 0),
        ancestors: Sequence[Sequence[Range]] | None = None,
        keys: Sequence[Range] | None = None,
    ) -> PrefixLayout:
        """Make a layout.

        Args:
            lengths: Queries of each row; rows are packed in this order.
            shared: (start, length) of the shared keys that all rows see, or one for each row.
            ancestors: For each row, (start, length) of the packed keys it sees between the shared
                ones and its own, in the order of their positions; may differ in number.
            keys: For each row, (start, length) of its own keys, of which the last belong to its
                queries. By default those of its queries.

        Raises:
            ValueError: A negative number, fewer own keys than queries, or lists that differ in
                length.
        """
        count = np.asarray(lengths, dtype=np.int64).reshape(-1)
        n = len(count)
        starts = np.cumsum(count) - count
        deep = max(map(len, ancestors or ()), default=0)
        table = np.zeros((n, ANCESTORS + 2 * deep), dtype=np.int64)
        table[:, QUERY], table[:, QUERIES] = starts, count
        table[:, OWN : KEYS + 1] = (
            np.stack([starts, count], 1) if keys is None else _ranges("keys", keys, n)
        )
        table[:, SHARED : PREFIX + 1] = _ranges("shared", shared, n)
        if ancestors is not None:
            if len(ancestors) != n:
                raise ValueError(_lengths_differ("ancestors", n, len(ancestors)))
            for row, chain in zip(table, ancestors, strict=True):
                for place, (start, length) in enumerate(chain):
                    row[ANCESTORS + 2 * place : ANCESTORS + 2 * place + 2] = start, length
        return cls(torch.from_numpy(_checked(table).astype(np.int32)))

    @property
    def queries(self) -> int:
        """Number of queries, T."""
        return int(self.rows[:, QUERIES].sum())

    @property
    def extent(self) -> tuple[int, int]:
        """Packed keys and shared keys that the ranges reach up to."""
        table = self.rows.numpy()
        packed = [table[:, c : c + 2] for c in (OWN, *range(ANCESTORS, table.shape[1], 2))]
        ends = [_end(ranges) for ranges in packed]
        return max(ends), _end(table[:, SHARED : PREFIX + 1])

    def position_ids(self) -> Tensor:
        """Return the position of each query, int64 ``(T,)`` on the CPU: the keys before it."""
        table = self.rows.numpy().astype(np.int64)
        first = totals(table) - table[:, QUERIES]
        index = np.arange(self.queries)
        return torch.from_numpy(index + np.repeat(first - table[:, QUERY], table[:, QUERIES]))

    def tables(self, device: torch.device, width: int) -> Tables:
        """Return the tables of a kernel whose tiles hold up to ``width`` queries."""
        found = self._tables.get((device, width))
        if found is None:
            table = self.rows.numpy()
            token_rows = np.repeat(np.arange(len(table), dtype=np.int32), table[:, QUERIES])
            made = (self.rows, torch.from_numpy(token_rows), torch.from_numpy(_tiles(table, width)))
            found = Tables(*(t.to(device, non_blocking=True) for t in made))
            self._tables[device, width] = found
        return found


def totals(table: np.ndarray) -> np.ndarray:
    """Return how many keys each row has."""
    return table[:, PREFIX] + table[:, KEYS] + table[:, ANCESTORS + 1 :: 2].sum(1)


def groups(table: np.ndarray, columns: Sequence[int]) -> list[Range]:
    """Return runs of rows, by first row and end, that agree in some columns; empty rows join."""
    if not len(table):
        return []
    keys = table[:, list(columns)]
    changes = np.flatnonzero((keys[1:] != keys[:-1]).any(1)) + 1
    bounds = [0, *changes.tolist(), len(table)]
    return list(pairwise(bounds))


def _tiles(table: np.ndarray, width: int) -> np.ndarray:
    starts = [SHARED, *range(ANCESTORS, table.shape[1], 2)]
    table = table[table[:, QUERIES] > 0]
    parts = []
    for low, high in groups(table, starts):
        begin, end = table[low, QUERY], table[high - 1, QUERY] + table[high - 1, QUERIES]
        first = np.arange(begin, end, width, dtype=np.int32)
        parts.append(np.stack([first, np.minimum(first + width, end)], 1).astype(np.int32))
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int32)


def _ranges(name: str, ranges: Range | Sequence[Range], n: int) -> np.ndarray:
    table = np.asarray(ranges, dtype=np.int64)
    if table.ndim == 1 and table.shape == (2,):
        return np.broadcast_to(table, (n, 2))
    if table.shape != (n, 2) and not (n == 0 and table.size == 0):
        raise ValueError(_lengths_differ(name, n, len(table)))
    return table.reshape(n, 2)


def _lengths_differ(name: str, rows: int, got: int) -> str:
    return message(name, f"a (start, length) for each of {rows} rows", got, "give one for each")


def _checked(table: np.ndarray) -> np.ndarray:
    for name, bad in (
        ("lengths, starts", table < 0),
        ("keys", (table[:, KEYS] < table[:, QUERIES])[:, None]),
    ):
        if bad.any():
            row = int(np.flatnonzero(bad.any(1))[0])
            wanted = "at least as many own keys as queries" if name == "keys" else "no negative one"
            raise ValueError(
                message(name, wanted, table[row].tolist(), f"look at row {row} of the layout")
            )
    if table.size and (table.max() >= 2**31 or table[:, QUERIES].sum() >= 2**31):
        raise ValueError(message("lengths", "fewer than 2^31 keys", int(table.max()), "split them"))
    return table


def _end(ranges: np.ndarray) -> int:
    used = ranges[ranges[:, 1] > 0]
    return int(used.sum(1).max()) if len(used) else 0
