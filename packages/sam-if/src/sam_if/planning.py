"""What a recorded run and its scores will take, before they begin."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, check_range
from shared_kernels.offload import memory_limits
from shared_kernels.units import format_bytes
from tqdm.auto import tqdm

from sam_if.records import flat_batch
from sam_if.trajectory import STORAGES, Trajectory
from sam_if.trajectory_influence import TrajectoryInfluence

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import Tensor, nn

    from sam_if.objective import Objective
    from sam_if.optim import SAM
    from sam_if.run import RecordedRun

#: How often what is timed is timed, behind a first time that is not.
_TIMES = 3
#: Bytes of memory that are left for all else.
_RESERVE = 512 << 20


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds of a run of SAM that is recorded, and of its scores.

    Attributes:
        parameters: That are trained.
        steps: Of the run.
        queries: That are asked.
        storage: ``all`` or ``sqrt``.
        place: Where weights and batches are kept: ``host memory`` or ``disk``.
        weight_bytes: Of the weights and moments that are kept.
        batch_bytes: Of the batches that are kept.
        free_bytes: That there are at that place now.
        device_bytes: At the most while scores are made: what was measured, on a GPU alone, and the
            weights and moments of the steps that are made again at a time.
        training_seconds: Of the run.
        adjoint_seconds: Of all queries.
        replay_seconds: Of making steps again, for all queries.
        problems: Why it would not end well; empty if nothing is known.
    """

    parameters: int
    steps: int
    queries: int
    storage: str
    place: str
    weight_bytes: int
    batch_bytes: int
    free_bytes: int
    device_bytes: int
    training_seconds: float
    adjoint_seconds: float
    replay_seconds: float
    problems: tuple[str, ...]

    def require(self) -> None:
        """Refuse to begin.

        Raises:
            MemoryError: There is less room than it will take.
        """
        if self.problems:
            raise MemoryError("; ".join(self.problems))


def plan(
    model: nn.Module,
    objective: Objective,
    optimizer: SAM,
    batch: Any,
    *,
    steps: int,
    queries: int = 1,
    together: int = 8,
    storage: str = "all",
    folder: str | os.PathLike[str] | None = None,
    keep_batches: bool = True,
    max_grad_norm: float | None = None,
) -> Plan:
    """Measure a step, and say what a run of many and its scores will take.

    A step's gradients and its adjoint are computed a few times. Nothing is trained or written;
    gradients that the model has are forgotten.

    Args:
        model: That will be trained.
        objective: Its losses.
        optimizer: That will train it.
        batch: Of a usual step.
        steps: Of the run.
        queries: That will be asked.
        together: Queries at a time, as in `TrajectoryInfluence.scores`.
        storage: As in `Trajectory`.
        folder: Where it will be recorded to; by default in host memory.
        keep_batches: Whether batches are kept, rather than made again.
        max_grad_norm: As in `Trajectory`.

    Raises:
        UnsupportedOptimizerError: The run could not be recorded.
        ValueError: An option that is out of range, or a model that could not be recorded.
    """
    check_choice("storage", storage, STORAGES)
    for name, value in (("steps", steps), ("queries", queries), ("together", together)):
        check_range(name, value, 1, 1 << 40, "at least one")
    run = Trajectory(model, objective, optimizer, max_grad_norm=max_grad_norm)
    with torch.no_grad():
        size = len(run.vector.losses(run.vector.read(), batch))
    run.record(batch, range(size))
    parameters = len(run.vector)
    snapshot, kept, apart = _kept(run, steps, storage)
    together = min(together, queries)
    parts = flat_batch(batch).values() if keep_batches else ()
    batches = steps * sum(part.nbytes for part in parts)
    device = run.vector.read().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = _seconds(lambda: _both_gradients(run, batch), device)
    influence = TrajectoryInfluence(run, check=False)
    asked = torch.randn(together, parameters, dtype=run.vector.read().dtype, device=device)
    back = _seconds(lambda: _adjoint(influence, asked), device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    peak += (apart - 1) * snapshot
    passes = math.ceil(queries / together)
    place, free, _ = _room(folder)
    problems = _lacks(kept * snapshot + batches, folder, storage)
    if device.type == "cuda" and peak > (total := torch.cuda.mem_get_info(device)[1]):
        problems.append(
            f"scores take {format_bytes(peak)} of the GPU, which has {format_bytes(total)}; fewer "
            "queries together, or storage='all'"
        )
    return Plan(
        parameters, steps, queries, storage, place, kept * snapshot, batches, free, peak,
        steps * step, passes * steps * back, passes * (steps - kept) * step, tuple(problems),
    )  # fmt: skip


def _kept(run: RecordedRun, steps: int, storage: str) -> tuple[int, int, int]:
    """Return bytes of a snapshot, how many are kept, and how many steps apart."""
    width = run.vector.read().element_size()
    snapshot = (1 + len(run.dynamics.moments)) * len(run.vector) * width
    # as Trajectory thins them out
    apart = 1 if storage == "all" else 1 << max(0, math.ceil(math.log2(steps / 2) / 2))
    return snapshot, math.ceil(steps / apart), apart


def _lacks(need: int, folder: str | os.PathLike[str] | None, storage: str) -> list[str]:
    """Return why a run does not fit where it is to be kept; nothing if it does."""
    place, free, advice = _room(folder)
    if need <= free:
        return []
    thinner = "storage='sqrt', " if storage == "all" else ""
    return [
        f"the run takes {format_bytes(need)} of {place}, and there are {format_bytes(free)}; "
        f"{thinner}batch_of for batches that are made again, or {advice}"
    ]


def require_room(
    run: RecordedRun, steps: int, storage: str, folder: str | os.PathLike[str], batch_bytes: int
) -> None:
    """Refuse a run that would fill the disk, before it begins.

    Args:
        run: Before its first step.
        steps: That it will take.
        storage: As in `Trajectory`.
        folder: Where it is recorded.
        batch_bytes: Of a step's batches.

    Raises:
        MemoryError: There is less room than it will take.
    """
    snapshot, kept, _ = _kept(run, steps, storage)
    if lacks := _lacks(kept * snapshot + steps * batch_bytes, folder, storage):
        raise MemoryError(lacks[0])


def _room(folder: str | os.PathLike[str] | None) -> tuple[str, int, str]:
    """Return where a run is kept, how many bytes there are, and what to do if they are too few."""
    if folder is None:
        return "host memory", max(0, memory_limits().free - _RESERVE), "a folder"
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return "disk", shutil.disk_usage(place).free, "another disk"


def _both_gradients(run: Trajectory, batch: Any) -> None:
    for _ in range(2):
        run.objective.losses(run.model, batch).mean().backward()
    run.model.zero_grad()


def _adjoint(influence: TrajectoryInfluence, asked: Tensor) -> None:
    with tqdm(disable=True) as bar:
        influence.backwards(asked, bar)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median of some times, behind a first one."""
    found = []
    for number in range(_TIMES + 1):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            found.append(time.perf_counter() - begin)
    return median(found)
