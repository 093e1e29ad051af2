"""Attention over a shared prefix in plain torch: dense calls for what rows share, then merges.

All queries that see the same keys are folded, with the heads of a group, into one long block of
queries, so the shared keys are read once and never copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from shared_kernels.ops.prefix_attention import dense
from shared_kernels.ops.prefix_attention.layout import (
    ANCESTORS,
    KEYS,
    OWN,
    QUERIES,
    QUERY,
    SHARED,
    groups,
    totals,
)
from shared_kernels.ops.prefix_attention.reference import accumulate_dtype

if TYPE_CHECKING:
    from collections.abc import Callable


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    lanes: Tensor,
    tiles: Tensor,
    blocks: Tensor,
    rows: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.prefix_attention` defines."""
    table = rows.numpy().astype(np.int64)
    table = table[table[:, QUERIES] > 0]
    work = _Work(q, k.shape[1], v.shape[2], table, scale, window, softcap)
    base = np.zeros(len(table), dtype=np.int64)
    for column in (SHARED, *range(ANCESTORS, table.shape[1], 2)):
        keys, values = (shared_k, shared_v) if column == SHARED else (k, v)
        work.add_range(keys, values, column, base)
        base = base + table[:, column + 1]
    work.add_own(k, v, base)
    return work.result(sinks)


class _Work:
    """Running output and log-sum-exp of all queries."""

    def __init__(
        self,
        q: Tensor,
        heads: int,
        width: int,
        table: np.ndarray,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        dtype = accumulate_dtype(q.dtype)
        self.q = q.unflatten(1, (heads, -1))
        self.out = self.q.new_zeros(*self.q.shape[:3], width, dtype=dtype)
        self.lse = self.q.new_full(self.q.shape[:3], float("-inf"), dtype=dtype)
        self.table = table
        self.scale, self.window, self.softcap = scale, window, softcap
        first = totals(table) - table[:, QUERIES]
        counts = table[:, QUERIES]
        #: Position of each query, in the order in which they are packed.
        self.positions = np.arange(counts.sum()) + np.repeat(first - table[:, QUERY], counts)

    def fold(self, part: slice | Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge attention over further keys into the queries of a part."""
        before, held = self.lse[part], self.out[part]
        total = torch.logaddexp(before, lse)
        safe = total.nan_to_num(neginf=0.0)
        weight, more = (before - safe).exp_()[..., None], (lse - safe).exp_()[..., None]
        self.lse[part] = total
        self.out[part] = held.mul_(weight).add_(out.mul_(more))

    def result(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return output ``(T, Hq, Dv)`` in the queries' dtype and log-sum-exp ``(T, Hq)``."""
        out, lse = self.out.flatten(1, 2), self.lse.flatten(1, 2)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.to(lse.dtype))
            out = out * (lse - total).exp()[..., None]
            lse = total
        return out.to(self.q.dtype), lse

    def add_range(self, keys: Tensor, values: Tensor, column: int, base: np.ndarray) -> None:
        """Attend to a range of keys that each row sees from its start on, up to a length."""
        table = self.table
        windowed = self.window is not None and bool(
            (totals(table) - base).max(initial=0) > self.window
        )
        columns = [table[:, column], base] if windowed else [table[:, column]]
        for low, high in groups(np.stack(columns, 1), range(len(columns))):
            lengths = table[low:high, column + 1]
            shortest, longest = int(lengths.min()), int(lengths.max())
            if not longest:
                continue
            start = int(table[low, column])
            q0, q1 = int(table[low, QUERY]), int(table[high - 1, [QUERY, QUERIES]].sum())
            plain = 0
            if not windowed and self.softcap is None:
                plain = shortest
            if plain:
                seen = slice(start, start + plain)
                self._add_dense(slice(q0, q1), keys[seen], values[seen])
            if longest > plain:
                seen = slice(start + plain, start + longest)
                visible = np.repeat(lengths, table[low:high, QUERIES])
                self._add_masked(
                    slice(q0, q1), keys[seen], values[seen], visible - plain,
                    self.positions[q0:q1] - base[low] - plain,
                )  # fmt: skip

    def _add_dense(self, part: slice, keys: Tensor, values: Tensor) -> None:
        queries = self.q[part].transpose(0, 1)
        folded = queries.reshape(1, queries.shape[0], -1, queries.shape[-1])
        k, v = (x.transpose(0, 1)[None] for x in (keys, values))
        out, lse = dense.attend(folded, k, v, self.scale)
        shape = queries.shape[:3]
        self.fold(
            part,
            out[0].unflatten(1, shape[1:]).transpose(0, 1),
            lse[0].unflatten(1, shape[1:]).transpose(0, 1),
        )

    def _add_masked(
        self, part: slice, keys: Tensor, values: Tensor, visible: np.ndarray, ahead: np.ndarray
    ) -> None:
        """Attend where a query sees the first ``visible`` keys that are less than W behind it.

        ``ahead`` is how far the query stands in front of the first key.
        """
        count, (_, heads, fold, _) = part.stop - part.start, self.q.shape
        block = max(1, dense.BLOCK_ELEMENTS // max(1, heads * fold * len(keys)))
        for low in range(0, count, block):
            high = min(count, low + block)
            lowest = 0
            if self.window is not None:
                lowest = max(0, int(ahead[low:high].min()) - self.window + 1)
            highest = int(visible[low:high].max())
            if highest <= lowest:
                continue
            index = np.arange(lowest, highest)
            hidden = index >= visible[low:high, None]
            if self.window is not None:
                hidden |= ahead[low:high, None] - index >= self.window
            chosen = slice(part.start + low, part.start + high)
            seen = slice(lowest, highest)
            self.fold(
                chosen,
                *self._softmax(
                    self.q[chosen].permute(1, 0, 2, 3)[None],
                    keys[seen].transpose(0, 1)[None],
                    values[seen].transpose(0, 1)[None],
                    torch.from_numpy(hidden)[None, None],
                    lambda x: x[0].transpose(0, 1),
                ),
            )

    def add_own(self, k: Tensor, v: Tensor, base: np.ndarray) -> None:
        """Attend to the rows' own keys; rows of about the same size go together, padded."""
        table = self.table
        sizes = np.frexp(table[:, KEYS].astype(np.float64))[1]
        for size in np.unique(sizes).tolist():
            rows = table[sizes == size]
            keys = int(rows[:, KEYS].max())
            windowed = self.window is not None and keys > self.window
            square = bool((rows[:, QUERIES] == rows[:, KEYS]).all())
            causal = square and not windowed and self.softcap is None
            held = self.q.shape[1] * self.q.shape[2] * int(rows[:, QUERIES].max()) * keys
            if held > dense.BLOCK_ELEMENTS and not causal:
                for row in rows.tolist():
                    self._add_long(k, v, *row[QUERY : KEYS + 1])
                continue
            together = max(1, dense.BLOCK_ELEMENTS // held)
            for low in range(0, len(rows), together):
                self._add_padded(k, v, rows[low : low + together], causal)

    def _add_long(self, k: Tensor, v: Tensor, q0: int, count: int, own: int, keys: int) -> None:
        place = np.arange(keys - count, keys)
        seen = slice(own, own + keys)
        self._add_masked(slice(q0, q0 + count), k[seen], v[seen], place + 1, place)

    def _add_padded(self, k: Tensor, v: Tensor, rows: np.ndarray, causal: bool) -> None:
        queries, keys = int(rows[:, QUERIES].max()), int(rows[:, KEYS].max())
        device = self.q.device
        q_index, q_valid = _indices(rows[:, QUERY], rows[:, QUERIES], queries, device)
        k_index, _ = _indices(rows[:, OWN], rows[:, KEYS], keys, device)
        places = q_index[q_valid]
        own_keys, own_values = k[k_index], v[k_index]
        if causal:
            # queries see no padding, which stands behind them
            fold = self.q.shape[2]
            out, lse = dense.attend(
                self.q[q_index].flatten(2, 3).transpose(1, 2),
                own_keys.repeat_interleave(fold, 2).transpose(1, 2),
                own_values.repeat_interleave(fold, 2).transpose(1, 2),
                self.scale,
                causal=True,
            )
            shape = self.q.shape[1:3]
            out = out.transpose(1, 2)[q_valid].unflatten(1, shape)
            self.fold(places, out, lse.transpose(1, 2)[q_valid].unflatten(1, shape))
            return
        behind = torch.from_numpy(rows[:, KEYS] - rows[:, QUERIES]).to(device)
        place = behind[:, None] + torch.arange(queries, device=device)
        ahead = place[:, :, None] - torch.arange(keys, device=device)
        hidden = ahead < 0
        if self.window is not None:
            hidden |= ahead >= self.window
        self.fold(
            places,
            *self._softmax(
                self.q[q_index].transpose(1, 2),
                own_keys.transpose(1, 2),
                own_values.transpose(1, 2),
                hidden[:, None],
                lambda x: x.transpose(1, 2)[q_valid],
            ),
        )

    def _softmax(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, rearrange: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Attend with a mask: q ``(B, H, M, G, D)``, k ``(B, H, N, D)``, mask ``(B, 1, M, N)``."""
        dtype = self.lse.dtype
        batch, heads, count, fold, _ = q.shape
        logits = q.to(dtype).flatten(2, 3) @ k.to(dtype).mT * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits.view(batch, heads, count, fold, -1)
        logits.masked_fill_(hidden.to(q.device)[:, :, :, None], float("-inf"))
        lse = logits.logsumexp(-1)
        weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp_()
        out = (weights.flatten(2, 3) @ v.to(dtype)).view(batch, heads, count, fold, -1)
        return rearrange(out), rearrange(lse)


def _indices(
    starts: np.ndarray, counts: np.ndarray, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return int64 and bool ``(rows, width)``: places in the packed order, and which exist.

    Places that do not exist repeat the row's last one.
    """
    offset = np.arange(width)
    valid = offset < counts[:, None]
    index = starts[:, None] + np.minimum(offset, counts[:, None] - 1)
    return torch.from_numpy(index).to(device), torch.from_numpy(valid).to(device)
