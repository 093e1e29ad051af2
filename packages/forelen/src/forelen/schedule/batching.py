"""Which answers to make together, so that little is padding."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from shared_kernels._checks import check_range
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forelen.distribution import LengthDistribution


def plan_batches(
    found: LengthDistribution, batch_size: int, *, token_budget: float | None = None
) -> list[list[int]]:
    """Cut answers into batches whose expected number of computed tokens is least.

    Answers are sorted by their mean; of the ways to cut them into as few batches as possible the
    one is taken that minimises ``sum_b |b| E[max_b L]``.

    Args:
        found: Of N answers.
        batch_size: Most answers of a batch.
        token_budget: Most expected tokens ``|b| E[max_b L]`` of a batch; one answer may have more.

    Returns:
        Rows of each batch, the batch of the longest first.

    Raises:
        ValueError: A batch size below 1.
    """
    check_range("batch_size", batch_size, 1, 1 << 31, "what fits into memory")
    count = len(found)
    if not count:
        return []
    order = np.argsort(-found.mean().cpu().numpy(), kind="stable")
    cost = _costs(found[order.tolist()], min(batch_size, count))
    allowed = cost if token_budget is None else np.where(cost <= token_budget, cost, np.inf)
    allowed[:, 0] = cost[:, 0]
    # fewest batches first, then fewest tokens: both add up, so prefixes of the best are the best
    batches = np.zeros(count + 1, dtype=np.int64)
    best = np.zeros(count + 1)
    cut = np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        starts = np.arange(max(0, end - batch_size), end)
        own = allowed[starts, end - starts - 1]
        starts = starts[np.isfinite(own)]
        own = own[np.isfinite(own)]
        place = np.lexsort((best[starts] + own, batches[starts]))[0]
        cut[end] = starts[place]
        batches[end] = batches[cut[end]] + 1
        best[end] = best[cut[end]] + own[place]
    ends = [count]
    while ends[-1]:
        ends.append(int(cut[ends[-1]]))
    bounds = ends[::-1]
    return [order[low:high].tolist() for low, high in pairwise(bounds)]


def _costs(found: LengthDistribution, most: int) -> np.ndarray:
    """Return ``|b| E[max_b L]`` of each run of rows: first row, and number of rows less one."""
    grid = torch.arange(found.end(), device=found.pmf.device).double()
    cdf = found.cdf(grid.expand(len(found), -1)).cpu().numpy()
    count = len(found)
    cost = np.full((count, most), np.inf)
    product = np.ones_like(cdf)
    for number in range(most):
        rows = count - number
        product = product[:rows] * cdf[number : number + rows]
        cost[:rows, number] = (number + 1) * (1 - product).sum(-1)
    return cost


class LengthAwareBatchSampler(Sampler):
    """Yields rows to generate together, for ``DataLoader(batch_sampler=...)``.

    Args:
        found: The length of each row's answer.
        batch_size: Most rows of a batch.
        window: Rows that are sorted among each other; by default all. With a window, batches keep
            near the order of the data.
        token_budget: As `plan_batches`.
    """

    def __init__(
        self,
        found: LengthDistribution,
        batch_size: int,
        *,
        window: int | None = None,
        token_budget: float | None = None,
    ) -> None:
        window = len(found) if window is None else window
        check_range("window", window, min(1, len(found)), 1 << 31, "some batches")
        self.batches = [
            [low + row for row in batch]
            for low in range(0, len(found), max(1, window))
            for batch in plan_batches(
                found[list(range(low, min(len(found), low + window)))], batch_size,
                token_budget=token_budget,
            )
        ]  # fmt: skip

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of each batch."""
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def padding_ratio(batches: list[list[int]], lengths: np.ndarray) -> float:
    """Return the share of computed tokens that are padding: ``1 - sum L / sum_b |b| max_b L``."""
    computed = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - lengths.sum() / computed
