"""Which answer to make next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from shared_kernels._checks import check_choice, message

if TYPE_CHECKING:
    from forelen.distribution import LengthDistribution

#: Priorities travel as signed 32-bit integers.
_LARGEST = 2**31 - 1
OBJECTIVES = ("latency", "makespan")


def priority(
    found: LengthDistribution,
    arrival: np.ndarray,
    *,
    aging: float,
    objective: str = "latency",
    scale: float = 1.0,
) -> np.ndarray:
    """Return static priorities int64 ``(N,)``; the lowest goes first.

    Sorting by ``length - aging (now - arrival)`` at any time gives the order of
    ``length + aging arrival``, so waiting counts though a priority is sent once; and no answer is
    passed by one that arrives more than ``(longest - its length) / aging`` later.

    Args:
        found: Of N answers.
        arrival: Seconds ``(N,)`` from any common origin.
        aging: Tokens that a second of waiting makes up for; above 0.
        objective: ``latency``, shortest first, or ``makespan``, longest first, which helps with
            lengths that are known; for predicted ones see `plan_order`.
        scale: Steps of priority for a token.

    Raises:
        ValueError: Another objective, or no aging, which would let some wait for ever.
    """
    check_choice("objective", objective, OBJECTIVES)
    if not aging > 0:
        raise ValueError(message("aging", "a positive number", aging, "10 tokens a second, say"))
    length = found.mean().cpu().numpy()
    sign = 1 if objective == "latency" else -1
    value = np.round((sign * length + aging * np.asarray(arrival, dtype=np.float64)) * scale)
    return np.clip(value, -_LARGEST, _LARGEST).astype(np.int64)


def gittins_index(pmf: np.ndarray, age: int = 0) -> float:
    """Return the Gittins index of an answer that has ``age`` tokens: the highest goes first.

    ``max_d P(L - a <= d | L > a) / E[min(L - a, d) | L > a]``: what completes for a token of
    service, at the best place to look again. (Scully and Harchol-Balter, 2020.)

    Args:
        pmf: float ``(X,)``, the probability of 1, 2, ... X tokens.
        age: Tokens that are there.

    Returns:
        0 if no probability lies beyond the age.

    Raises:
        ValueError: A negative age.
    """
    if age < 0:
        raise ValueError(message("age", "at least 0", age, "count the tokens that are there"))
    ahead = np.asarray(pmf, dtype=np.float64)[age:]
    left = ahead.sum()
    if left <= 0:
        return 0.0
    done = np.cumsum(ahead)
    # sum over the d first tokens of the probability that they are needed
    served = np.cumsum(left - np.concatenate([[0.0], done[:-1]]))
    return float((done / served).max())
