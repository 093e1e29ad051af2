"""Rows to score, and which of their tokens pass together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(eq=False)
class Work:
    """Rows to score, and the place for their results.

    Attributes:
        rows: int64, the tokens of each row behind the prefix, targets included; where there is a
            table, numbers of its rows.
        first: int64 ``(N,)``, the place of each row's first target.
        targets: int64 ``(R,)``, the target tokens of all rows, end to end.
        bounds: int64 ``(N + 1,)``, where the targets of each row begin.
        table: Embeddings ``(U, d)`` that stand for the tokens.
        results: float32 ``(3, R)`` on the device, NaN until computed: log-probability, log-sum-exp
            of the logits that the target is chosen from, and 1 if it is the likeliest token.
        computed: Tokens passed through the model, padding included.
        passes: Forward passes.
        advance: Told the number of rows that are done.
    """

    rows: list[np.ndarray]
    first: np.ndarray
    targets: np.ndarray
    bounds: np.ndarray
    table: Tensor | None
    results: Tensor
    computed: int = 0
    passes: int = 0
    advance: Callable[[int], object] | None = None

    @classmethod
    def of(
        cls,
        rows: list[np.ndarray],
        first: np.ndarray,
        device: torch.device,
        *,
        table: Tensor | None = None,
        targets: np.ndarray | None = None,
    ) -> Work:
        """Make work of rows; targets are read off them unless they are given."""
        counts = np.array([len(row) for row in rows], dtype=np.int64) - first
        bounds = np.concatenate([[0], np.cumsum(counts)])
        if targets is None:
            ends = [row[start:] for row, start in zip(rows, first.tolist(), strict=True)]
            targets = np.concatenate(ends) if ends else np.zeros(0, dtype=np.int64)
        results = torch.full((3, int(bounds[-1])), float("nan"), device=device)
        return cls(rows, first, targets, bounds, table, results)


def targets_of(
    work: Work, order: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the row in ``order`` of each target, the place that predicts it, and its slot."""
    begins = work.bounds[order]
    counts = work.bounds[order + 1] - begins
    owner = np.repeat(np.arange(len(order)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    # the first target may be predicted by the prefix itself
    place = np.maximum(work.first[order][owner] + within - depth - 1, -1)
    return owner, place, begins[owner] + within


def groups(tokens: np.ndarray, bounds: np.ndarray, most: int) -> list[slice]:
    """Cut rows at ``bounds``, and join neighbours that have at most ``most`` tokens together."""
    edges = [0, *bounds.tolist(), len(tokens)]
    found: list[slice] = []
    for low, high in pairwise(edges):
        if found and tokens[found[-1].start : high].sum() <= most:
            found[-1] = slice(found[-1].start, high)
        else:
            found.append(slice(low, high))
    return found
