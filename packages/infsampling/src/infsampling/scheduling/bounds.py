"""How few steps any schedule can take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def lower_bound(lengths: ArrayLike, slots: int) -> int:
    """Return steps that no schedule of samples on ``slots`` places can do without.

    ``max(L_max, ceil(sum L / S), L_(S) + L_(S+1))`` with lengths from the longest down: of the
    S + 1 longest two share a slot. With parking, a sample may change its place, and the last term
    does not hold: see `preemptive_bound`.

    Args:
        lengths: int ``(G,)``, tokens of each sample.
        slots: S.
    """
    found = np.sort(np.asarray(lengths, dtype=np.int64))[::-1]
    bound = preemptive_bound(found, slots)
    if len(found) > slots:
        bound = max(bound, int(found[slots - 1] + found[slots]))
    return bound


def preemptive_bound(lengths: ArrayLike, slots: int) -> int:
    """Return ``max(L_max, ceil(sum L / S))``, which parking reaches (McNaughton, 1959)."""
    found = np.asarray(lengths, dtype=np.int64)
    return int(max(found.max(initial=0), -(-found.sum() // slots)))


def free_slots(lengths: ArrayLike) -> int:
    """Return ``ceil(sum L / L_max)``: so many slots take as many steps as one for each sample."""
    found = np.asarray(lengths, dtype=np.int64)
    return int(-(-found.sum() // max(1, found.max(initial=1)))) if len(found) else 0
