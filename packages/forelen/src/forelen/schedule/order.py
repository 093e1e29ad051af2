"""The order in which to start answers so that the last of them ends soon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from shared_kernels._checks import check_range

if TYPE_CHECKING:
    from forelen.distribution import LengthDistribution

#: Numbers that a search by default goes through, and how many as long as a call of numpy takes.
_WORK, _CALL = 2_000_000_000, 15_000


def plan_order(
    found: LengthDistribution,
    slots: int,
    *,
    cap: int | None = None,
    samples: int = 96,
    steps: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Return the order of start with the least expected end of all, as far as a search finds it.

    Longest first is right for lengths that are known. Predicted ones are not: an answer that was
    thought short, starts last and turns out long keeps all waiting. So lengths are drawn from the
    distributions, an order is judged by its mean end over the draws, and answers are moved or
    exchanged as long as that helps, beginning with the better of shortest and longest first.

    A change is judged in time proportional to ``N * slots * samples``: a thousand take a second for
    64 answers.

    Args:
        found: The predicted length of each answer; independent of each other.
        slots: Answers at a time.
        cap: Tokens at which answers are stopped.
        samples: Draws of all lengths.
        steps: Changes that are tried; by default 1000, and fewer for long queues, so that it is a
            matter of seconds.
        seed: Of draws and changes.

    Returns:
        Rows of ``found``, the first to start first.

    Raises:
        ValueError: A number below 1.
    """
    check_range("slots", slots, 1, 1 << 31, "answers at a time")
    check_range("samples", samples, 1, 1 << 20, "96 are enough for most")
    count = len(found)
    if steps is None:
        cost = max(1, count) * (slots * samples + _CALL)
        steps = min(1000, _WORK // cost)
    check_range("steps", steps, 0, 1 << 31, "1000 are enough for 64 answers")
    if count <= slots:
        return list(range(count))
    generator = np.random.default_rng(seed)
    draws = _draws(found, samples, generator)
    if cap is not None:
        draws = np.minimum(draws, cap)
    mean = found.capped_mean(cap).cpu().numpy()
    starts = [np.argsort(sign * mean, kind="stable") for sign in (1, -1)]
    order = min(starts, key=lambda tried: _end(tried, draws, slots))
    best = _end(order, draws, slots)
    for step in range(steps):
        a, b = generator.integers(0, count, 2)
        tried = order.copy()
        if step % 2:
            tried[[a, b]] = tried[[b, a]]
        else:
            tried = np.insert(np.delete(order, a), b, order[a])
        end = _end(tried, draws, slots)
        if end < best:
            order, best = tried, end
    return order.tolist()


def _draws(found: LengthDistribution, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Return lengths ``(samples, N)``, each answer's spread evenly over its distribution."""
    cdf = found.tokens(found.end()).cumsum(-1).cpu().numpy()
    levels = (np.arange(samples) + generator.random((len(cdf), samples))) / samples
    lengths = [np.searchsorted(row, level) + 1 for row, level in zip(cdf, levels, strict=True)]
    return generator.permuted(np.stack(lengths), axis=1).T.astype(np.float64)


def _end(order: np.ndarray, draws: np.ndarray, slots: int) -> float:
    """Return the mean end of the last answer; each starts where a place is free first."""
    ends, rows = np.zeros((len(draws), slots)), np.arange(len(draws))
    for answer in order:
        ends[rows, ends.argmin(1)] += draws[:, answer]
    return float(ends.max(1).mean())
