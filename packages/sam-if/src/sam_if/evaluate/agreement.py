"""How far predicted effects and true ones agree, with intervals."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from shared_kernels._checks import check_choice, message
from torch import Tensor

from sam_if.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ("spearman", "pearson")


class Difference(NamedTuple):
    """Of two agreements with the same truth, and where it lies by resampling."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Agreement:
    """Predicted and true effects of the same removals.

    Attributes:
        predicted: ``(Q, m)``, float64.
        true: ``(Q, m)``, float64.
    """

    predicted: Tensor
    true: Tensor

    @property
    def spearman(self) -> Tensor:
        """Correlation of ranks of each query, ``(Q,)``; NaN where all predictions are the same."""
        return torch.from_numpy(correlations(self.predicted.numpy(), self.true.numpy(), "spearman"))

    @property
    def pearson(self) -> Tensor:
        """Correlation of each query, ``(Q,)``; NaN where all predictions are the same."""
        return torch.from_numpy(correlations(self.predicted.numpy(), self.true.numpy(), "pearson"))

    def mean(self, kind: str = "spearman") -> float:
        """Return the mean correlation over queries.

        Args:
            kind: ``spearman`` or ``pearson``.
        """
        check_choice("kind", kind, KINDS)
        return float(getattr(self, kind).mean())

    def interval(
        self, kind: str = "spearman", *, confidence: float = 0.95, resamples: int = 1000,
        seed: int = 0,
    ) -> tuple[float, float]:  # fmt: skip
        """Return where the mean lies, by the bootstrap's percentiles over removals.

        Queries are not drawn anew: it is of these queries.

        Args:
            kind: ``spearman`` or ``pearson``.
            confidence: Of the interval.
            resamples: How many.
            seed: Of their draws.
        """
        check_choice("kind", kind, KINDS)

        def mean(chosen: Any) -> Any:
            return _mean_of(self, chosen, kind)

        return _bootstrap(mean, self.true.shape[1], confidence, resamples, seed)

    def difference(
        self, other: Agreement, kind: str = "spearman", *, confidence: float = 0.95,
        resamples: int = 1000, seed: int = 0,
    ) -> Difference:  # fmt: skip
        """Return by how much the mean is above another's, with a paired interval.

        Args:
            other: Of other scores, with the same truth.
            kind: As in `interval`, as are the others.
            confidence: Of the interval.
            resamples: How many, each with the same removals for both.
            seed: Of their draws.

        Raises:
            ValueError: Another truth.
        """
        check_choice("kind", kind, KINDS)
        if not torch.equal(self.true, other.true):
            remedy = "evaluate both with the same retrainings; a path keeps them"
            got = tuple(other.true.shape)
            raise ValueError(message("other", "the same true effects", got, remedy))

        def apart(chosen: Any) -> Any:
            return _mean_of(self, chosen, kind) - _mean_of(other, chosen, kind)

        low, high = _bootstrap(apart, self.true.shape[1], confidence, resamples, seed)
        return Difference(self.mean(kind) - other.mean(kind), low, high)


def values_of(scores: Scores | Tensor) -> Tensor:
    """Return the values of scores, ``(Q, n)`` in float64 on the CPU.

    Raises:
        ValueError: They are not of queries and samples, or not finite.
    """
    values = scores.values if isinstance(scores, Scores) else scores
    if values.dim() != 2 or not values.isfinite().all():
        remedy = "a row for each query, a column for each training sample"
        raise ValueError(message("scores", "finite (Q, n)", values, remedy))
    return values.detach().double().cpu()


def correlations(one: Any, other: Any, kind: str) -> Any:
    """Return correlations along the last axis of arrays."""
    if kind == "spearman":
        one, other = stats.rankdata(one, axis=-1), stats.rankdata(other, axis=-1)
    with warnings.catch_warnings():
        # NaN tells as much
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return stats.pearsonr(one, other, axis=-1).statistic


def _mean_of(found: Agreement, chosen: Any, kind: str) -> Any:
    """Return means over queries of the correlations of resampled removals ``(..., m)``."""
    one, other = found.predicted.numpy()[:, chosen], found.true.numpy()[:, chosen]
    return correlations(one, other, kind).mean(0)


def _bootstrap(
    statistic: Callable[[Any], Any], count: int, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    if count < 3:
        raise ValueError(message("removals", "at least 3", count, "retrain without more of them"))
    found = stats.bootstrap(
        (np.arange(count),), lambda chosen, axis: statistic(chosen), vectorized=True,
        n_resamples=resamples, batch=50, confidence_level=confidence, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
