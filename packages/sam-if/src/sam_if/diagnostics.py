"""Whether a recorded run can be asked what its samples did, and how far answers reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from sam_if.attribution import field_of
from sam_if.errors import DerivativeError, TrajectoryError, UnsupportedOptimizerError
from sam_if.hessian_influence import RESTLESS

if TYPE_CHECKING:
    from sam_if.run import RecordedRun

#: How far a sample's loss alone may be from that among others, by dtype.
_APART = {torch.float64: 1e-9, torch.float32: 1e-3}
#: How far apart weights two steps apart are in a cycle, as a part of a step.
_CYCLE = 0.1
#: Above this, perturbations move with the weights by more than the weights themselves.
_STEEP = 10.0


@dataclass(frozen=True)
class RunReport:
    """What was found of a run.

    Attributes:
        steps: Recorded.
        samples: That were trained on.
        optimizer: Inside of SAM.
        worst_step: How far a step is from its record, see `RecordedRun.check`; None if it failed.
        replayed: Whether the run, made again, gave the same bits.
        derivative_error: Of second derivatives, as a part of them; None if they are wrong.
        coupling: How far a sample's loss depends on others of its batch, as a part of it; None
            where batches cannot be taken apart.
        clipped: Part of the steps whose gradient was clipped; None where none is.
        stationarity: At the end, see `SAMField.stationarity`; None without a closed form.
        kappa: At the end, see `SAMField.kappa`; the same.
        problems: Why scores are not what they say.
        remarks: What to know of them.
    """

    steps: int
    samples: int
    optimizer: str
    worst_step: float | None
    replayed: bool
    derivative_error: float | None
    coupling: float | None
    clipped: float | None
    stationarity: float | None
    kappa: float | None
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def check_run(run: RecordedRun, *, progress: bool = False) -> RunReport:
    """Make a run's steps anew, and look at what its scores rest on.

    It takes about as long as the run itself three times.

    Args:
        run: The record.
        progress: Show bars.
    """
    problems, remarks = [], []
    worst, derivative, replayed = None, None, False
    try:
        worst = run.check()
    except TrajectoryError as error:
        problems.append(str(error))
    try:
        replayed = torch.equal(run.retrain([], progress=progress), run.weights)
    except TrajectoryError as error:
        problems.append(str(error))
    if not replayed:
        remarks.append(
            "made again, the run gives other bits: storage='all' has its own weights, others and "
            "retraining are of a run that is close to it"
        )
    first = next(iter(run.forwards()))
    try:
        derivative = run.loss(first).derivative_error(first.weights)
    except DerivativeError as error:
        problems.append(str(error))
    coupling = _coupling(run, run.batches(0)[0])
    if coupling is not None and coupling > _APART[first.weights.dtype]:
        problems.append(
            f"the loss of a sample depends on others of its batch, by {coupling:.2g} of it: what "
            "its removal does is then not its own"
        )
    stationarity = kappa = None
    try:
        field, _ = field_of(run)
        stationarity, kappa = field.stationarity(), field.kappa()
    except (TrajectoryError, UnsupportedOptimizerError) as error:
        remarks.append(str(error))
    if _goes_to_and_fro(run):
        remarks.append(
            "the run goes to and fro between two points and does not come to rest: SAM with all "
            "data in a batch has no fixed point where weight decay is 0 or small; give it decay, "
            "batches, or a smaller rho"
        )
    if stationarity is not None and stationarity > RESTLESS:
        remarks.append(
            f"the run did not come to rest (stationarity {stationarity:.2g}): the closed form, "
            "method='hessian', is not reliable; method='trajectory' is"
        )
    if kappa is not None and kappa > _STEEP:
        remarks.append(
            f"perturbations move with the weights by {kappa:.2g}: scores without SAM's terms, "
            "method='frozen', are of another run"
        )
    return RunReport(
        len(run), len({n for record in run.records for own in record.samples for n in own}),
        run.optimizer_name, worst, replayed, derivative, coupling, _clipped(run, progress),
        stationarity, kappa, tuple(problems), tuple(remarks),
    )  # fmt: skip


def _goes_to_and_fro(run: RecordedRun) -> bool:
    """Whether the last steps lead back to where the ones before them began."""
    if len(run) < 3:
        return False
    steps = run.backwards()
    last, before = run.weights, next(steps).weights
    first = next(steps).weights
    length = torch.linalg.vector_norm(last - before)
    # steps of another kind of rest are short themselves
    far = length > torch.finfo(last.dtype).eps ** 0.5 * torch.linalg.vector_norm(last)
    return bool(far) and bool(torch.linalg.vector_norm(last - first) < _CYCLE * length)


def _coupling(run: RecordedRun, batch: Any) -> float | None:
    """Return how far losses of samples alone are from those of their batch."""
    weights = run.weights
    with torch.no_grad():
        whole = run.vector.losses(weights, batch, measured=True)
        alone = []
        for place in range(len(whole)):
            own = slice(place, place + 1)
            if hasattr(batch, "items"):
                part: Any = {name: value[own] for name, value in batch.items()}
            elif isinstance(batch, (tuple, list)):
                part = tuple(value[own] for value in batch)
            else:
                return None
            alone.append(run.vector.losses(weights, part, measured=True))
    apart = (torch.cat(alone) - whole).abs().max()
    return float(apart / whole.abs().max().clamp(min=torch.finfo(whole.dtype).tiny))


def _clipped(run: RecordedRun, progress: bool) -> float | None:
    """Return in what part of the steps the gradient was longer than it may be."""
    if run.max_grad_norm is None:
        return None
    count = 0
    for step in tqdm(run.forwards(), "norms", len(run), unit="step", disable=not progress):
        loss = run.loss(step)
        gradient = loss.gradient(step.weights + run.perturbation(step, loss).epsilon)
        count += float(torch.linalg.vector_norm(gradient)) > run.max_grad_norm
    return count / len(run)
