"""How good predictions are, beside what is possible."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._checks import message

if TYPE_CHECKING:
    from torch import Tensor

    from forelen.distribution import LengthDistribution

LEVELS = (0.5, 0.8, 0.9, 0.95)
_QUANTILES = np.linspace(0.025, 0.975, 39)


@dataclass(frozen=True)
class Report:
    """Errors in tokens on N answers to P prompts. A stopped answer counts as its cap.

    Attributes:
        answers: N.
        prompts: P.
        censored: The share that was stopped.
        mae: Mean absolute error of the median.
        mae_interval: Where 95 % of resamples of the prompts put it.
        rmse: Root of the mean squared error of the mean.
        pinball: Mean over 39 quantiles.
        crps: Continuous ranked probability score.
        kendall: Rank correlation of the medians and the lengths, tau b.
        constant: Error of the best constant, which training's median is.
        floor: Error of the median of the other answers to the same prompt; None without siblings.
        explained: ``(constant - mae) / (constant - floor)``.
        coverage: Of nominal central intervals, how many lengths they hold, as `covered`.
        within: How many lie in the intervals of whole tokens, ends included: at least as many.
        width: Mean width of these intervals.
        buckets: Coverage of the nominal 80 % by quarters of the predicted medians.
    """

    answers: int
    prompts: int
    censored: float
    mae: float
    mae_interval: tuple[float, float]
    rmse: float
    pinball: float
    crps: float
    kendall: float
    constant: float
    floor: float | None
    explained: float | None
    coverage: dict[str, float]
    within: dict[str, float]
    width: dict[str, float]
    buckets: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self)


def sibling_floor(lengths: Tensor, groups: Tensor) -> float | None:
    """Return the error of the median of the other answers to the same prompt, in tokens.

    It is what a predictor that knew a prompt's distribution about would reach; with few siblings
    it lies above, because their median is noisy.
    """
    y, group = lengths.double().cpu().numpy(), groups.cpu().numpy()
    order = np.argsort(group, kind="stable")
    _, starts = np.unique(group[order], return_index=True)
    errors = []
    for members in np.split(y[order], starts[1:]):
        if len(members) > 1:
            rest = [np.median(np.delete(members, place)) for place in range(len(members))]
            errors.append(np.abs(members - rest))
    return float(np.concatenate(errors).mean()) if errors else None


def covered(
    found: LengthDistribution, lengths: Tensor, nominal: float, *, censored: Tensor | None = None
) -> Tensor:
    """Return how much of each length a central interval holds, float64 ``(N,)`` in [0, 1].

    A length that has probability of its own is a step of the distribution; if the end of an
    interval cuts through it, the part inside counts. So a right predictor's intervals hold just as
    much as they say, and none gains by whole tokens being wide.

    Args:
        found: Of N answers.
        lengths: int64 ``(N,)``.
        nominal: How much the intervals say they hold.
        censored: bool ``(N,)``, answers that were stopped: their step is all that is longer.
    """
    y = lengths.to(found.pmf.device).double()
    upper, lower = found.cdf(y), found.cdf(y - 1)
    if censored is not None:
        stopped = censored.to(upper.device)
        lower, upper = torch.where(stopped, upper, lower), torch.where(stopped, 1.0, upper)
    low, high = found.levels(1 - nominal)
    step = upper - lower
    share = (upper.clamp(max=high) - lower.clamp(min=low)) / step.clamp(min=1e-300)
    # what was thought impossible has no step: it is inside or not
    inside = (low < upper) & (upper <= high)
    return torch.where(step > 1e-12, share.clamp(0, 1), inside.double())


def evaluate(
    found: LengthDistribution,
    lengths: Tensor,
    groups: Tensor,
    *,
    constant: float,
    cap: int | None = None,
    censored: Tensor | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Report:
    """Compare distributions with the lengths that came out.

    Args:
        found: Of N answers.
        lengths: int64 ``(N,)``.
        groups: int64 ``(N,)``, the prompt of each.
        constant: The median of training's lengths.
        cap: Tokens at which answers were stopped; predictions are cut there.
        censored: bool ``(N,)``, answers that were.
        resamples: Of the prompts, for the interval of the error.
        seed: Of the resamples.

    Raises:
        ValueError: No answers, or tensors that do not fit.
    """
    from scipy.stats import kendalltau

    if not len(found) or lengths.shape != (len(found),) or groups.shape != lengths.shape:
        remedy = "give a length and a prompt for each answer"
        raise ValueError(message("lengths", f"{len(found)} lengths", lengths, remedy))
    found = found.to("cpu")
    y = lengths.double().cpu().numpy()
    group = groups.cpu().numpy()
    top = float("inf") if cap is None else float(cap)

    def quantile(tau: float) -> np.ndarray:
        return np.minimum(found.quantile(float(tau)).numpy(), top)

    median = quantile(0.5)
    errors = np.abs(y - median)
    pinball = []
    for tau in _QUANTILES:
        gap = y - np.where(np.isfinite(q := quantile(tau)), q, y.max())
        pinball.append(np.maximum(tau * gap, (tau - 1) * gap).mean())
    coverage, within, width = {}, {}, {}
    for level in LEVELS:
        low, high = (np.minimum(end.numpy(), top) for end in found.interval(1 - level))
        coverage[f"{level:g}"] = float(covered(found, lengths, level, censored=censored).mean())
        within[f"{level:g}"] = float(((low <= y) & (y <= high)).mean())
        finite = np.where(np.isfinite(high), high, y.max())
        width[f"{level:g}"] = float((finite - low).mean())
    inside = covered(found, lengths, 0.8, censored=censored).numpy()
    quarters = np.array_split(np.argsort(median, kind="stable"), 4)
    floor = sibling_floor(lengths, groups)
    baseline = float(np.abs(y - min(constant, top)).mean())
    mae = float(errors.mean())
    _, member = np.unique(group, return_inverse=True)
    totals = np.bincount(member, errors)
    counts = np.bincount(member)
    draws = np.random.default_rng(seed).integers(0, len(counts), (resamples, len(counts)))
    means = totals[draws].sum(1) / counts[draws].sum(1)
    mean = np.minimum(found.capped_mean(cap).numpy(), top)
    explained = None
    if floor is not None and baseline > floor:
        explained = (baseline - mae) / (baseline - floor)
    return Report(
        answers=len(y),
        prompts=len(counts),
        censored=0.0 if censored is None else float(censored.double().mean()),
        mae=mae,
        mae_interval=(float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))),
        rmse=float(np.sqrt(((y - mean) ** 2).mean())),
        pinball=float(np.mean(pinball)),
        crps=float(found.crps(lengths.cpu(), cap).mean()),
        kendall=float(np.nan_to_num(kendalltau(median, y).statistic)),
        constant=baseline,
        floor=floor,
        explained=explained,
        coverage=coverage,
        within=within,
        width=width,
        buckets=[float(inside[q].mean()) if len(q) else float("nan") for q in quarters],
    )
