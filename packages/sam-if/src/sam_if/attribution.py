"""From the folder of a recorded run to scores, in one call."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice

from sam_if.errors import TrajectoryError, UnsupportedOptimizerError
from sam_if.field import SAMField
from sam_if.hessian_influence import HessianInfluence
from sam_if.scores import Scores
from sam_if.trajectory import Trajectory
from sam_if.trajectory_influence import TrajectoryInfluence

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

    from sam_if.objective import Objective
    from sam_if.run import RecordedRun

METHODS = ("trajectory", "frozen", "gif", "hessian")
#: Of `TrajectoryInfluence`, by method.
_HESSIANS = {"trajectory": "full", "frozen": "frozen", "gif": "none"}


def attribute(
    run: str | os.PathLike[str] | RecordedRun,
    queries: Iterable[Any],
    *,
    method: str = "trajectory",
    model: nn.Module | None = None,
    objective: Objective | None = None,
    mean: bool = False,
    together: int = 8,
    solver: str = "auto",
    damping: float = 0.0,
    check: bool = True,
    progress: bool = False,
) -> Scores:
    """Return what each training sample of a recorded run did to what is asked.

    A score is by how much a query would rise if the sample had not been trained on, its places in
    batches left empty: where the query is a loss, those above 0 helped.

    Args:
        run: Folder of a record, or the record.
        queries: Batches, as the objective measures them.
        method: ``trajectory`` is the derivative of the run itself; ``frozen`` takes perturbations
            for constants; ``gif`` leaves Hessians out, as the paper's SAM-GIF and gradient tracing
            do; ``hessian`` is the closed form, the paper's SAM-HIF with all terms, for runs that
            came to rest.
        model: That was trained; by default the one of transformers that is in the folder.
        objective: Of the record; None for a ready-made one.
        mean: Ask for the mean of all queries.
        together: Queries that go through the run at a time.
        solver: Of the closed form, see `HessianInfluence`.
        damping: Of the closed form, see `HessianInfluence`.
        check: Make the run's steps anew first, and refuse one that is not as recorded.
        progress: Show a bar.

    Raises:
        TrajectoryError: The run is not as recorded, or has no closed form.
        UnsupportedOptimizerError: AdamW with weight decay has another fixed point than SAM's.
        ValueError: No queries, or an option that is out of range.
    """
    check_choice("method", method, METHODS)
    found = opened(run, model, objective)
    if method == "hessian":
        return _closed_form(found, queries, mean, solver, damping)
    influence = TrajectoryInfluence(found, _HESSIANS[method], check=check)
    return influence.scores(queries, mean=mean, together=together, progress=progress)


def opened(
    run: str | os.PathLike[str] | RecordedRun,
    model: nn.Module | None = None,
    objective: Objective | None = None,
) -> RecordedRun:
    """Return the record of a run.

    Args:
        run: Its folder, or itself.
        model: By default the one of transformers that is in the folder.
        objective: None for a ready-made one.
    """
    from sam_if.run import RecordedRun

    if isinstance(run, RecordedRun):
        return run
    if model is None:
        from sam_if.recording import kept_model

        model = kept_model(run)
    return Trajectory.open(run, model, objective)


def field_of(run: RecordedRun) -> tuple[SAMField, torch.Tensor]:
    """Return the field at a run's end, and the numbers of its samples in its own order.

    Its batches are those of the last steps that have every sample once; the radius and the decay
    are those of the last step.

    Raises:
        TrajectoryError: There are no such steps, or steps have several micro-batches.
        UnsupportedOptimizerError: AdamW with weight decay: where the optimizer rests SAM's field is
            not 0.
    """
    last = run.records[-1]
    if run.optimizer_name == "AdamW" and any(last.weight_decay):
        raise UnsupportedOptimizerError(
            "method: AdamW with weight decay comes to rest where m / sqrt(q) + lambda w = 0, "
            "which is no fixed point of SAM; take method='trajectory'"
        )
    wanted = {n for record in run.records for own in record.samples for n in own}
    batches, numbers = [], []
    for index in range(len(run) - 1, -1, -1):
        samples = run.records[index].samples
        if len(samples) > 1:
            raise TrajectoryError(
                f"step {index}: it has {len(samples)} micro-batches, and the closed form knows "
                "steps of one batch; take method='trajectory'"
            )
        batches += run.batches(index)
        numbers += samples[0]
        if len(numbers) >= len(wanted):
            break
    if sorted(numbers) != sorted(wanted):
        raise TrajectoryError(
            "the last steps do not have every sample once, so that they are no epoch; make a "
            "SAMField of the data, or take method='trajectory'"
        )
    decay = next(iter(run.backwards())).weight_decay
    kept = run.vector.read()
    kind = "full" if len(batches) == 1 else "minibatch"
    try:
        run.vector.write(run.weights)
        field = SAMField(
            run.model, run.objective, batches, last.rho, decay, adaptive=run.adaptive,
            perturbation=kind, norm_eps=run.norm_eps,
        )  # fmt: skip
    finally:
        run.vector.write(kept)
    return field, torch.tensor(numbers)


def _closed_form(
    run: RecordedRun, queries: Iterable[Any], mean: bool, solver: str, damping: float
) -> Scores:
    field, numbers = field_of(run)
    with warnings.catch_warnings():
        # they are in the scores
        warnings.simplefilter("ignore", UserWarning)
        influence = HessianInfluence(field, solver, damping=damping)
        found = influence.scores(queries, mean=mean)
    values = found.values.new_zeros(len(found.values), run.count)
    values[:, numbers] = found.values
    return Scores(values, found.method, found.residuals, found.warnings)
