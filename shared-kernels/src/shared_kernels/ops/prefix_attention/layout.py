"""Which keys each packed row of queries sees."""

from __future__ import annotations

import functools
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
    """What the kernel reads, on one device; all int32.

    Attributes:
        lanes: ``(T, 5 + 2A)``: the row of each query, then for the shared range, each ancestor and
            the own keys how many of them the query sees from their start on, and how far it
            stands in front of the first.
        tiles: ``(n, 7)``: first query and end of a tile, start of the shared range, how many
            whole blocks' keys of it all queries see, how far the one furthest back stands in
            front of its first key, and first and end of the blocks that follow.
        blocks: ``(m, 8)``: further blocks of keys: whether they are shared, first key, number of
            keys, column of the lanes, place of the first key in its range, the row they belong
            to, or -1, how many of its first keys are an ancestor's, and where these begin.
    """

    lanes: Tensor
    tiles: Tensor
    blocks: Tensor


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
    _tables: dict[tuple[torch.device, int, int], Tables] = field(default_factory=dict, repr=False)

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

    @functools.cached_property
    def queries(self) -> int:
        """Number of queries, T."""
        return int(self.rows[:, QUERIES].sum())

    @functools.cached_property
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

    def tables(self, device: torch.device, width: int, block: int) -> Tables:
        """Return the tables for tiles of up to ``width`` queries and blocks of ``block`` keys."""
        found = self._tables.get((device, width, block))
        if found is None:
            made = _tables(self.rows.numpy().astype(np.int64), width, block)
            found = Tables(
                *(torch.from_numpy(t.astype(np.int32)).to(device, non_blocking=True) for t in made)
            )
            self._tables[device, width, block] = found
        return found


class FixedLayout(PrefixLayout):
    """A layout whose tables stay where they are on a device while others take its place.

    For CUDA graphs, which read from the same addresses at every replay. There is room for twice
    the tiles and blocks that it is made with.
    """

    def tables(self, device: torch.device, width: int, block: int) -> Tables:
        """Return the tables, with empty tiles at the end."""
        if (device, width, block) not in self._tables:
            lanes, tiles, blocks = super().tables(device, width, block)
            twice = (torch.cat([x, torch.zeros_like(x)]) for x in (tiles, blocks))
            self._tables[device, width, block] = Tables(lanes, *twice)
        return self._tables[device, width, block]

    def take(self, other: PrefixLayout) -> bool:
        """Become like ``other`` to the kernels, if its tables fit; return whether they do."""
        pairs = [
            (place, value)
            for key, held in self._tables.items()
            for place, value in zip(held, other.tables(*key), strict=True)
        ]
        for place, value in pairs:
            if place.shape[1] != value.shape[1] or place.shape[0] < value.shape[0]:
                return False
        for place, value in pairs:
            place[: value.shape[0]].copy_(value)
            place[value.shape[0] :].zero_()
        return True


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


def _tables(table: np.ndarray, width: int, block: int) -> tuple[np.ndarray, ...]:
    table = table[table[:, QUERIES] > 0]
    columns = (SHARED, *range(ANCESTORS, table.shape[1], 2))
    if not len(table):
        shapes = ((0, 3 + 2 * len(columns)), (0, 7), (0, 8))
        return tuple(np.zeros(shape, dtype=np.int64) for shape in shapes)
    token_rows = np.repeat(np.arange(len(table)), table[:, QUERIES])
    whole, (table, taken, origin) = table, _join(table, block)
    lanes = _lanes(whole, columns, token_rows)
    lanes[:, 1:-2:2] = table[token_rows][:, [column + 1 for column in columns]]
    first, end = _tiles(table, columns, width)
    row0, row1 = token_rows[first], token_rows[end - 1]
    tiles = np.zeros((len(first), 7), dtype=np.int64)
    tiles[:, 0], tiles[:, 1] = first, end
    tiles[:, 2] = table[row0, SHARED]
    tiles[:, 3] = _reduce(np.minimum, table[:, PREFIX], row0, row1) // block * block
    # of the queries of a tile, the first of a row stands furthest back
    tiles[:, 4] = np.minimum.reduceat(lanes[:, 2], first)
    parts = []
    for place, column in enumerate(columns):
        seen = _reduce(np.maximum, table[:, column + 1], row0, row1)
        low = tiles[:, 3] if column == SHARED else np.zeros_like(seen)
        tile, offset = _expand(np.maximum(seen - low, 0), block)
        offset += low[tile]
        parts.append(
            _blocks(
                tile, column == SHARED, table[row0[tile], column], offset, seen[tile], block,
                1 + 2 * place,
            )
        )  # fmt: skip
    tile = np.repeat(np.arange(len(first)), row1 - row0 + 1)
    row = row0[tile] + _counting(row1 - row0 + 1)
    queries = table[row, QUERIES]
    seen = table[row, KEYS] - queries + np.minimum(end[tile] - table[row, QUERY], queries)
    pair, offset = _expand(seen + taken[row], block)
    own, last = row[pair], 1 + 2 * len(columns)
    offset -= taken[own]
    parts.append(_blocks(tile[pair], False, table[own, OWN], offset, seen[pair], block, last, own))
    parts[-1][:, 7], parts[-1][:, 8] = np.maximum(-offset, 0), origin[own]
    blocks = np.concatenate(parts)
    blocks = blocks[np.argsort(blocks[:, 0], kind="stable")]
    tiles[:, 5] = np.searchsorted(blocks[:, 0], np.arange(len(first)))
    tiles[:, 6] = np.searchsorted(blocks[:, 0], np.arange(len(first)), side="right")
    return lanes, tiles, blocks[:, 1:]


def _join(table: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let the rest of a row's last ancestor share a block with the row's own keys.

    What goes beyond an ancestor's whole blocks joins if the own keys need no more blocks for it.

    Returns:
        The table without what has joined; how many keys have, for each row; where they begin.
    """
    starts, lengths = table[:, ANCESTORS::2], table[:, ANCESTORS + 1 :: 2]
    if not lengths.shape[1]:
        none = np.zeros(len(table), dtype=np.int64)
        return table, none, none
    row, last = np.arange(len(table)), lengths.shape[1] - 1 - (lengths[:, ::-1] > 0).argmax(1)
    own, rest = table[:, KEYS], lengths[row, last] % block
    taken = np.where(-(-(own + rest) // block) == -(-own // block), rest, 0)
    table = table.copy()
    table[row, ANCESTORS + 1 + 2 * last] -= taken
    return table, taken, starts[row, last] + table[row, ANCESTORS + 1 + 2 * last]


def _lanes(table: np.ndarray, columns: Sequence[int], token_rows: np.ndarray) -> np.ndarray:
    rows = table[token_rows]
    own = rows[:, KEYS] - rows[:, QUERIES] + np.arange(len(rows)) - rows[:, QUERY] + 1
    lengths = [rows[:, column + 1] for column in columns]
    ahead = own - 1 + sum(lengths)
    lanes = [token_rows]
    for length in lengths:
        lanes += [length, ahead]
        ahead = ahead - length
    return np.stack([*lanes, own, ahead], 1)


def _tiles(table: np.ndarray, columns: Sequence[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the queries into tiles whose rows see ranges that start at the same places."""
    parts = []
    for low, high in groups(table, columns):
        begin, end = table[low, QUERY], table[high - 1, QUERY] + table[high - 1, QUERIES]
        first = np.arange(begin, end, width)
        parts.append((first, np.minimum(first + width, end)))
    first, end = (np.concatenate(part) for part in zip(*parts, strict=True))
    return first, end


def _reduce(ufunc: np.ufunc, values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Reduce ``values[low : high + 1]`` for each pair of bounds."""
    bounds = np.stack([low, high + 1], 1).reshape(-1)
    return ufunc.reduceat(np.append(values, values[-1:]), bounds)[::2]


def _counting(counts: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... up to each count, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _expand(lengths: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return index and offset of each block of ranges with these lengths."""
    counts = -(-lengths // block)
    return np.repeat(np.arange(len(lengths)), counts), _counting(counts) * block


def _blocks(
    tile: np.ndarray,
    shared: bool,
    start: np.ndarray,
    offset: np.ndarray,
    seen: np.ndarray,
    block: int,
    column: int,
    row: np.ndarray | int = -1,
) -> np.ndarray:
    made = np.zeros((len(tile), 9), dtype=np.int64)
    made[:, 0], made[:, 1] = tile, shared
    made[:, 2], made[:, 3] = start + offset, np.minimum(seen - offset, block)
    made[:, 4], made[:, 5], made[:, 6] = column, offset, row
    return made


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
