"""Training samples whose label is likely wrong, by how a run came to believe it.

A label that contradicts the rest of the data is believed late. ``margin`` is by how much the logit
of the given label is below the largest other one, of the samples of each step's batch before the
step: the mean of its tanh over the run, after the area under the margin of arXiv:2001.10528. A step
counts by its rate of learning, so that the last ones count little, in which networks learn the rest
by heart, and by the part of its batch that the network gets right, so that the first ones do, in
which it knows nothing. It takes a pass through each batch, no gradients and no training again.

A run that was stopped before it learnt labels by heart has seen too little for that mean, and its
``end_margin`` finds more.

``self_influence`` is by how much a sample's own loss would rise without it, and ``left_out_loss``
the sum of both: the loss as if it had not been trained on, to first order. They take an adjoint
pass a sample, so that they are of a shortlist by loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, check_range, message
from torch import Tensor
from tqdm.auto import tqdm

from sam_if.hessian_influence import HessianInfluence
from sam_if.objective import ParameterVector
from sam_if.trajectory_influence import TrajectoryInfluence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sam_if.field import SAMField
    from sam_if.run import RecordedRun

SCORES = ("margin", "end_margin", "loss", "self_influence", "left_out_loss")


@dataclass(frozen=True)
class Suspect:
    """A training sample and how suspicious its label is.

    Attributes:
        sample: Its number.
        score: The larger the more suspicious.
        rank: From 1 on.
        label: That it was given; None where the objective has no labels of samples.
        loss: Of the model at the end.
    """

    sample: int
    score: float
    rank: int
    label: int | None
    loss: float


@dataclass(frozen=True)
class Suspects:
    """Training samples, the most suspicious first.

    Attributes:
        score: Which it is.
        rows: In order.
    """

    score: str
    rows: tuple[Suspect, ...]

    def __iter__(self) -> Iterator[Suspect]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Suspect:
        return self.rows[index]

    def values(self, count: int) -> Tensor:
        """Return scores in the order of the training data, ``(count,)``; -inf of others.

        Args:
            count: Training samples there are.
        """
        found = torch.full((count,), -torch.inf, dtype=torch.float64)
        for row in self.rows:
            found[row.sample] = row.score
        return found

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with a column for each attribute of `Suspect`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas: pandas is not installed; pip install pandas, or go over the rows"
            ) from error
        return pd.DataFrame(list(self.rows), columns=list(Suspect.__dataclass_fields__))


def detect_mislabels(
    run: RecordedRun | TrajectoryInfluence | HessianInfluence,
    score: str = "margin",
    *,
    k: int | None = None,
    shortlist: int | None = None,
    together: int = 8,
    progress: bool = False,
) -> Suspects:
    """Return the training samples of a run, by how likely their label is wrong.

    Args:
        run: A record, a `Trajectory`, or its influence, whose ``hessian`` self-influence is then
            of; or a closed form, which has no run, and so no margins, and no labels.
        score: ``margin``, which is for `classification`, as is ``end_margin``, of the model at the
            end; ``loss`` of it, the plain alternative; ``self_influence`` or ``left_out_loss``.
        k: How many, at most; by default all that have a score.
        shortlist: Of samples with the largest losses that get one of the last two scores; by
            default a fifth of the data.
        together: Samples that go through a run at a time.
        progress: Show bars.

    Raises:
        TrajectoryError: The run is not as it was recorded.
        ValueError: An option out of range, no steps, or margins without a run or of another
            objective.
    """
    check_choice("score", score, SCORES)
    if k is not None:
        check_range("k", k, 1, 1 << 31, "how many to look at")
    recorded = None
    if isinstance(run, HessianInfluence):
        samples, losses, labels = _of_field(run.field)
    else:
        recorded = run.trajectory if isinstance(run, TrajectoryInfluence) else run
        samples, losses, labels = _of_run(recorded, progress)
    if score == "loss":
        chosen, values = samples, losses
    elif score in ("margin", "end_margin"):
        found = _margins(recorded, progress, ended=score == "end_margin")
        chosen, values = samples, -found[samples]
    else:
        size = -(-len(samples) // 5) if shortlist is None else shortlist
        check_range("shortlist", size, 1, 1 << 31, "how many samples get a score")
        worst = losses.argsort(descending=True, stable=True)[:size]
        chosen = samples[worst]
        if isinstance(run, HessianInfluence):
            own = run.self_influence(chosen.tolist())
        else:
            through = run if isinstance(run, TrajectoryInfluence) else TrajectoryInfluence(run)
            own = through.self_influence(chosen.tolist(), together=together, progress=progress)
        values = own.double().cpu() + (losses[worst] if score == "left_out_loss" else 0.0)
    place, rows = {int(n): index for index, n in enumerate(samples)}, []
    for rank, index in enumerate(values.argsort(descending=True, stable=True)[:k].tolist(), 1):
        number = int(chosen[index])
        at = place[number]
        label = None if labels is None else labels[at]
        rows.append(Suspect(number, float(values[index]), rank, label, float(losses[at])))
    return Suspects(score, tuple(rows))


Ended = tuple[Tensor, Tensor, "list[int] | None"]


@torch.no_grad()
def _of_field(field: SAMField) -> Ended:
    """Return the samples of a field, and what is measured of them; it has no labels."""
    batches = [part[0] for group in field.groups for part in group.batches]
    found = [field.vector.losses(field.weights, batch, measured=True) for batch in batches]
    losses = torch.cat(found).double().cpu()
    return torch.arange(len(losses)), losses, None


@torch.no_grad()
def _of_run(run: RecordedRun, progress: bool) -> Ended:
    """Return the samples of a run, in order, what is measured of them behind it, and labels.

    Raises:
        ValueError: It has no steps.
    """
    if not len(run):
        raise ValueError(message("run", "recorded steps", 0, "record a run"))
    weights, losses, labels = run.weights, {}, {}
    for batch, own in _first_pass(run, progress):
        found = run.vector.losses(weights, batch, measured=True)
        losses |= zip(own, found.tolist(), strict=True)
        if _classifies(run):
            labels |= zip(own, _labels(run, batch).tolist(), strict=True)
    samples = sorted(losses)
    values = torch.tensor([losses[n] for n in samples], dtype=torch.float64)
    return torch.tensor(samples), values, [labels[n] for n in samples] if labels else None


def _first_pass(run: RecordedRun, progress: bool) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Return batches and their samples' numbers until each was there; later ones are not made."""
    left = {n for record in run.records for part in record.samples for n in part}
    for step in tqdm(run.forwards(), "the end", len(run), disable=not progress):
        for batch, place, _ in step.batches:
            yield batch, step.samples[place]
            left -= set(step.samples[place])
        if not left:
            return


@torch.no_grad()
def _margins(run: RecordedRun | None, progress: bool, *, ended: bool) -> Tensor:
    """Return mean margins of the samples over the steps, or those behind them, ``(count,)``.

    Raises:
        ValueError: There is no run, or its objective is not `classification`.
    """
    if run is None or not _classifies(run):
        remedy = "score='loss' and 'self_influence' are of any objective"
        got = "a closed form" if run is None else type(run.objective).__name__
        expected = "a record of classification() for margins"
        raise ValueError(message("run", expected, got, remedy))
    objective: Any = run.objective
    vector = ParameterVector(run.model, replace(objective, of_outputs=_margin))
    total = torch.zeros(run.count, dtype=torch.float64)
    if ended:
        weights = run.weights
        for batch, own in _first_pass(run, progress):
            total[list(own)] = vector.losses(weights, batch).double().cpu()
        return total
    weight = torch.zeros_like(total)
    for step in tqdm(run.forwards(), "margins", len(run), disable=not progress):
        rate = float(torch.as_tensor(step.lr, dtype=torch.float64).mean())
        found = torch.cat([
            vector.losses(step.weights, batch).double().cpu() for batch, _, _ in step.batches
        ])  # fmt: skip
        share = rate * (found > 0).double().mean()
        own = torch.tensor(step.samples)
        total.index_add_(0, own, share * found.tanh())
        weight.index_add_(0, own, share.expand(len(own)))
    # of a run that got nothing right there is nothing to say
    return torch.where(weight > 0, total / weight, 0.0)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how far the logit of each label is above the largest other one, ``(b,)``."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own[:, 0] - others.amax(1)


def _classifies(run: RecordedRun) -> bool:
    spec = getattr(run.objective, "spec", None) or {}
    return spec.get("name") == "classification"


def _labels(run: RecordedRun, batch: Any) -> Tensor:
    """Return the labels of a batch as `classification` finds them."""
    objective: Any = run.objective
    return batch[objective.labels] if hasattr(batch, "keys") else batch[1]
