"""Continue a run: open its log, and bring stores to the state after the last logged step."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from zo2.fingerprint import LogHeader
from zo2.log import FLUSH, LogError, UpdateLog
from zo2.updates import folds

if TYPE_CHECKING:
    from pathlib import Path

    from shared_kernels.offload import OffloadEngine

    from zo2.materializer import Materializer

__all__ = ["adopt_log", "check_run", "open_run", "restore_records", "set_aside"]


def open_run(path: Path, header: dict[str, Any]) -> UpdateLog:
    """Start a log, or open the one that is there after checking that it is of this run.

    Args:
        path: The file.
        header: What this run would write.

    Raises:
        LogError: The log belongs to other weights or settings, or is damaged.
        BlockingIOError: Somebody else is writing it.
    """
    if not path.exists():
        return UpdateLog.create(path, header)
    log = UpdateLog.open(path, mode="a")
    try:
        check_run(log, header)
    except BaseException:
        log.close()
        raise
    return log


def check_run(log: UpdateLog, header: dict[str, Any]) -> None:
    """Check that a log is of the run whose header is given.

    Raises:
        LogError: A setting or a base weight differs.
    """
    path, found, ours = log.path, LogHeader.from_dict(log.header), LogHeader.from_dict(header)
    for name in ("arithmetic", "dist", "eps", "q", "run_seed", "fold_every", "rounding", "rng"):
        if getattr(found, name) != getattr(ours, name):
            raise LogError(
                f"{path} was written with {name}={getattr(found, name)!r}, this run has "
                f"{getattr(ours, name)!r}: continue it with the same setting, or start a new log"
            )
    theirs = {p.name: p for p in found.parameters}
    for entry in ours.parameters:
        if theirs.pop(entry.name, None) != entry:
            raise LogError(
                f"{path} does not fit this model: parameter {entry.name!r} differs in value, "
                "shape, dtype, store or unit from the base the log was started from"
            )
    if theirs:
        raise LogError(f"{path} trains parameters this model does not: {sorted(theirs)[:3]}")


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


# -- logs beside checkpoints ---------------------------------------------------------------------


def set_aside(path: Path) -> Path | None:
    """Make room for a new log: rename one that holds records, delete one that holds none.

    Returns:
        The new name (``run.1.zolog``, ``run.2.zolog``…), or None if nothing was kept.

    Raises:
        BlockingIOError: Somebody is writing it.
        LogError: The file is no log.
    """
    if not path.exists():
        return None
    with UpdateLog.open(path, mode="a", verify=False) as log:
        if not len(log):
            path.unlink()
            return None
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    return kept


def adopt_log(saved: Path, path: Path) -> Path | None:
    """Make the log at ``path`` what it was when ``saved`` was copied from it.

    A log that went on from there loses what came later; any other one is set aside.

    Returns:
        The name under which another run's log was kept, if there was one.
    """
    content = saved.read_bytes()
    if path.exists() and path.read_bytes().startswith(content):
        with UpdateLog.open(saved) as copy, UpdateLog.open(path, "a", verify=False) as log:
            log.truncate(len(copy))
        return None
    kept = set_aside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    shutil.copyfile(saved, part)
    part.replace(path)
    return kept
