"""Continue a run: bring stores to the state they were in after the last logged step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from zo2.log import FLUSH, UpdateLog
from zo2.updates import folds

if TYPE_CHECKING:
    from shared_kernels.offload import OffloadEngine

    from zo2.materializer import Materializer

__all__ = ["restore_records"]


def restore_records(engine: OffloadEngine, materializer: Materializer, log: UpdateLog) -> None:
    """Replay a log's records into freshly filled stores, folding where the run had folded.

    Afterwards stores, versions and pending records are what they were when the last record was
    written, so the run goes on bit for bit.

    Args:
        engine: An engine at step 0.
        materializer: Its materializer.
        log: A log of the same run; damage was ruled out when it was opened for appending.
    """
    records = log.records
    is_update = (records["flags"] & FLUSH) == 0
    if not is_update.any():
        return
    updates_before = np.concatenate([[0], np.cumsum(is_update)])
    materializer.pending.restore(records[is_update])
    version = materializer.store.version
    for unit in engine.plan.units:
        changed: list[str] = []
        with engine.borrow(unit.index, changed) as buffer:
            for fold in folds(records, unit.index, materializer.fold_every):
                stop = int(updates_before[fold.stop])
                rows = slice(version[unit.index], stop)
                changed[:] = materializer.replay(unit.index, buffer, rows, fold.dither_seed)
                version[unit.index] = stop
