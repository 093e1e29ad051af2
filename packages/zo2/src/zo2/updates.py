"""From log records to arithmetic: which update rows a record stands for, and where blocks fold.

The engine and the replay share these rules, so that both do the same operations in the same order.
numpy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from zo2._logformat import FLUSH, SKIPPED

if TYPE_CHECKING:
    from collections.abc import Iterator


def update_rows(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn update records into rows for `shared_kernels.ops.zo`.

    A step of q directions gives q rows, applied in order as y ← a·y - b·z(seed, direction), where
    b = (lr/q)·g_k, and a = 1 - lr·λ in the first row of a step and 1 in the others. Every product
    and difference is rounded to float32. A skipped step gives rows with a = 1 and b = 0.

    Args:
        records: Structured array (n,) of `zo2.log.record_dtype`; flushes are left out.

    Returns:
        ``keys`` int32 (n·q, 3), the seed's low and high word and the direction; and ``coefs``
        float32 (n·q, 2), a and b.
    """
    records = records[(records["flags"] & FLUSH) == 0]
    q = records["g"].shape[1]
    applied = (records["flags"] & SKIPPED) == 0
    lr = np.where(applied, records["lr"], np.float32(0))
    decay = np.where(applied, records["weight_decay"], np.float32(0))
    g = np.where(applied[:, None], records["g"], np.float32(0))
    coefs = np.ones((len(records), q, 2), np.float32)
    coefs[:, 0, 0] = np.float32(1) - lr * decay
    coefs[:, :, 1] = (lr / np.float32(q))[:, None] * g
    keys = np.empty((len(records), q, 3), np.uint32)
    keys[:, :, 0] = (records["seed"] & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None]
    keys[:, :, 1] = (records["seed"] >> np.uint64(32)).astype(np.uint32)[:, None]
    keys[:, :, 2] = np.arange(q, dtype=np.uint32)
    return keys.reshape(-1, 3).view(np.int32), coefs.reshape(-1, 2)


class Fold(NamedTuple):
    """Where a block's pending updates were written into its store.

    Attributes:
        stop: Index into the log of the first record that is not folded; every update record before
            it (and after the last fold) is.
        dither_seed: Seed of the stochastic rounding.
    """

    stop: int
    dither_seed: int


def folds(records: np.ndarray, unit: int, fold_every: int) -> Iterator[Fold]:
    """Yield the folds of one unit, in order.

    Unit i folds at its visit of step t, before that step's perturbation, iff (t + i) mod K = 0,
    with step t's seed; and at every FLUSH record, with that record's seed. Folds with nothing
    pending are left out: they change no bit.

    Args:
        records: Structured array of `zo2.log.record_dtype`.
        unit: The unit's index in the parameter table.
        fold_every: K.
    """
    flush = (records["flags"] & FLUSH) != 0
    due = flush | ((records["step"].astype(np.int64) + unit) % fold_every == 0)
    updates_before = np.concatenate([[0], np.cumsum(~flush)])
    folded = 0
    for stop in np.flatnonzero(due):
        if updates_before[stop] > folded:
            yield Fold(int(stop), int(records["seed"][stop]))
            folded = updates_before[stop]
