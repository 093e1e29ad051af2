"""Plan one packed forward pass over many rows of tokens that share beginnings.

The rows form a trie. It is cut into paths (heavy-path decomposition: a path goes on into the branch
that most rows take), every path is one packed row, and a row sees the tokens before its first one
in the rows that they belong to. So every shared token is computed once and nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from shared_kernels._checks import check_range, message
from shared_kernels.ops.prefix_attention import PrefixLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

#: Fewer tokens saved than this are computed again rather than looked up in another row.
MIN_SAVING = 8


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Rows packed end to end, each token computed once.

    Attributes:
        tokens: int64 ``(T,)``, the packed tokens.
        source: int64 ``(T, 2)``, the row and the place in it that each token comes from.
        cu_seqlens: int64 ``(n + 1,)``, bounds of the packed rows.
        row_id: int64 ``(T,)``, the packed row of each token.
        positions: int64 ``(T,)``, number of tokens before each, those of the prefix not counted.
        segments: For each packed row, (first token, number of tokens) of the parts of other
            packed rows that stand before it.
        index: int64 ``(sum of lengths,)``, the packed token of every token of the input rows.
        bounds: int64 ``(N + 1,)``, where each input row begins in ``index``.
    """

    tokens: np.ndarray
    source: np.ndarray
    cu_seqlens: np.ndarray
    row_id: np.ndarray
    positions: np.ndarray
    segments: list[list[tuple[int, int]]]
    index: np.ndarray
    bounds: np.ndarray

    @property
    def shared_len(self) -> np.ndarray:
        """Tokens of other packed rows that each packed row sees, int64 ``(n,)``."""
        return np.array([sum(n for _, n in chain) for chain in self.segments], dtype=np.int64)

    def place(self, rows: np.ndarray | int, places: np.ndarray) -> np.ndarray:
        """Return the packed tokens at ``places`` of input rows, int64."""
        return self.index[self.bounds[rows] + places]

    def rebuild(self) -> list[np.ndarray]:
        """Return the input rows, read off the packed tokens."""
        return np.split(self.tokens[self.index], self.bounds[1:])[:-1]

    def layout(self, prefix: int, size: int | None = None) -> PrefixLayout:
        """Return what each packed row sees after ``prefix`` shared keys.

        With a size, a row that sees only itself makes up for so many tokens in all.
        """
        lengths, segments = np.diff(self.cu_seqlens).tolist(), self.segments
        shared = [(0, prefix)] * len(lengths)
        if size is not None:
            # of a range of its own, so that it shares no tile with the others
            lengths, shared = [*lengths, size - len(self.tokens)], [*shared, (1, 0)]
            segments = [*segments, []]
        return PrefixLayout.build(lengths, shared=shared, ancestors=segments)


def plan(
    rows: Sequence[Sequence[int] | np.ndarray | torch.Tensor], *, max_depth: int = 3
) -> PackedLayout:
    """Pack rows so that what they share is computed once.

    Args:
        rows: Token ids of each row; equal rows are computed once, empty ones not at all.
        max_depth: Of how many packed rows an input row may consist; 1 shares nothing but equal
            rows and beginnings that are rows themselves.

    Raises:
        TypeError: A row that does not hold integers.
        ValueError: ``max_depth`` below 1.
    """
    check_range("max_depth", max_depth, 1, 2**31, "3 is enough for most")
    arrays = [_as_ids(row, number) for number, row in enumerate(rows)]
    order, common = sort_rows(arrays)
    return pack(arrays, order, common, max_depth)


def _as_ids(row: Sequence[int] | np.ndarray | torch.Tensor, number: int) -> np.ndarray:
    ids = np.asarray(row)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(message(f"rows[{number}]", "one dimension of token ids", row, "encode it"))
    return ids.astype(np.int64)


def sort_rows(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows lexicographically.

    Returns:
        int64 ``(N,)``: their order, and how many tokens each sorted row has in common with the one
        before it (0 for the first).
    """
    flat = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ends = np.cumsum(lengths)
    # bytes of big-endian integers sort as the integers do
    text, bounds = flat.astype(">i8").tobytes(), (8 * ends).tolist()
    keys = [text[low:high] for low, high in zip([0, *bounds], bounds, strict=False)]
    order = np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.int64)
    common = np.zeros(len(rows), dtype=np.int64)
    if len(rows) > 1:
        starts, lengths = (ends - lengths)[order], lengths[order]
        # the tokens that each row and the one before it may share, and one place that ends them
        shared = np.minimum(lengths[1:], lengths[:-1])
        bounds = np.cumsum(shared + 1)
        first = bounds - shared - 1
        within = np.arange(bounds[-1]) - np.repeat(first, shared + 1)
        pairs = (np.repeat(x, shared + 1) + within for x in (starts[1:], starts[:-1]))
        one, other = (np.append(flat, 0)[place] for place in pairs)
        stop = (one != other) | (within == np.repeat(shared, shared + 1))
        places = np.flatnonzero(stop)
        common[1:] = within[places[np.searchsorted(places, first)]]
    return order, common


class _Node:
    """A branching point or an end of the trie: the tokens up to ``depth`` of a row."""

    __slots__ = ("children", "depth", "path", "row", "users", "weight")

    def __init__(self, depth: int, row: int) -> None:
        self.depth, self.row = depth, row
        self.children: list[_Node] = []
        self.users: list[int] = []
        self.weight = 0
        self.path: _Path | None = None

    def order_children(self) -> None:
        """Put the branch that most rows take first."""
        self.weight = len(self.users)
        if self.children:
            self.weight += sum(child.weight for child in self.children)
            self.children.sort(key=lambda child: -child.weight)


class _Path:
    """One packed row: the tokens from ``start`` to ``end`` of a row."""

    __slots__ = ("before", "end", "packed", "row", "saving", "start")

    def __init__(self, head: _Node, start: int, before: list[tuple[_Path, int]]) -> None:
        self.start = start
        #: Other paths and how many of their tokens stand before, in order.
        self.before = before
        #: Tokens that other paths need not compute if they hang on this one.
        self.saving = 0
        node = head
        while node.children:
            self.saving += (len(node.children) - 1) * (node.depth - start)
            node = node.children[0]
        self.end, self.row = node.depth, node.row
        self.packed = 0

    def chain(self, depth: int) -> list[tuple[_Path, int]]:
        """Return what the tokens up to ``depth`` consist of."""
        return [*self.before, (self, depth - self.start)]


def _trie(rows: Sequence[np.ndarray], order: np.ndarray, common: np.ndarray) -> _Node:
    root = _Node(0, 0)
    stack = [root]
    for row, shared in zip(order.tolist(), common.tolist(), strict=True):
        last = root
        while stack[-1].depth > shared:
            last = stack.pop()
        if stack[-1].depth < shared:
            branch = _Node(shared, row)
            branch.children.append(last)
            stack[-1].children[-1] = branch
            stack.append(branch)
        if stack[-1].depth < len(rows[row]):
            leaf = _Node(len(rows[row]), row)
            stack[-1].children.append(leaf)
            stack.append(leaf)
        stack[-1].users.append(row)
    return root


def pack(
    rows: Sequence[np.ndarray], order: np.ndarray, common: np.ndarray, max_depth: int
) -> PackedLayout:
    """Pack sorted rows; see `plan`."""
    root = _trie(rows, order, common)
    nodes, waiting = [], [root]
    while waiting:
        nodes.append(waiting.pop())
        waiting += nodes[-1].children
    for node in reversed(nodes):
        node.order_children()
    paths: list[_Path] = []
    for node in nodes:
        for place, child in enumerate(node.children):
            if place == 0 and node.path is not None:
                child.path = node.path
                continue
            child.path = _branch(child, node, max_depth)
            paths.append(child.path)
    # rows that hang on the same ones lie together, so that a kernel's tiles are full
    numbers = {path: number for number, path in enumerate(paths)}
    paths.sort(key=lambda path: [(numbers[other], n) for other, n in path.before])
    paths.sort(key=lambda path: [numbers[other] for other, _ in path.before])
    return _emit(rows, nodes, paths)


def _branch(head: _Node, parent: _Node, max_depth: int) -> _Path:
    trunk = parent.path
    if trunk is None:
        return _Path(head, 0, [])
    before = trunk.chain(parent.depth)
    if len(before) >= max_depth or trunk.saving < MIN_SAVING:
        return _Path(head, trunk.start, trunk.before)
    return _Path(head, parent.depth, before)


def _emit(rows: Sequence[np.ndarray], nodes: list[_Node], paths: list[_Path]) -> PackedLayout:
    counts = np.array([path.end - path.start for path in paths], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    for path, begin in zip(paths, bounds.tolist(), strict=False):
        path.packed = begin
    row_id = np.repeat(np.arange(len(paths)), counts)
    starts = np.array([path.start for path in paths], dtype=np.int64)
    positions = np.arange(len(row_id)) - np.repeat(bounds[:-1] - starts, counts)
    owners = np.repeat(np.array([path.row for path in paths], dtype=np.int64), counts)
    tokens = [rows[path.row][path.start : path.end] for path in paths]
    return PackedLayout(
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int64),
        source=np.stack([owners, positions], 1),
        cu_seqlens=bounds,
        row_id=row_id,
        positions=positions,
        segments=[[(other.packed, n) for other, n in path.before] for path in paths],
        index=_index(rows, nodes),
        bounds=np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]),
    )


def _index(rows: Sequence[np.ndarray], nodes: list[_Node]) -> np.ndarray:
    """Return the packed token of every token of the rows."""
    parts: list[list[tuple[int, int]]] = [[] for _ in rows]
    for node in nodes:
        if node.path is not None:
            chain = [(path.packed, length) for path, length in node.path.chain(node.depth)]
            for row in node.users:
                parts[row] = chain
    flat = [part for chain in parts for part in chain]
    if not flat:
        return np.zeros(0, dtype=np.int64)
    begins, lengths = (np.array(column, dtype=np.int64) for column in zip(*flat, strict=True))
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(begins - ends + lengths, lengths)
