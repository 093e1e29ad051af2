"""How well scores tell samples with a wrong label from others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from shared_kernels._checks import message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class AUROCResult:
    """Of scores that should be larger for flipped labels.

    Attributes:
        auroc: How often a flipped sample has a larger score than another; ties count half.
        interval: Where it lies, by the bootstrap's percentiles over samples of both kinds.
        precision: By k: the part of flipped ones among the k largest scores; of ties at the end,
            the part that a random order of them would have.
    """

    auroc: float
    interval: tuple[float, float]
    precision: dict[int, float]


def auroc(
    scores: Tensor | Sequence[float],
    flipped: Tensor | Sequence[bool],
    k: Sequence[int] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> AUROCResult:
    """Return the area under the ROC curve, which is Mann and Whitney's statistic, and precisions.

    Args:
        scores: ``(n,)``, the larger the more suspicious. Of effects of removal on a validation
            loss, helpful samples are the large ones: give them negated.
        flipped: ``(n,)``: whose label is wrong.
        k: Where to take precisions; by default at the number of flipped samples.
        confidence: Of the interval.
        resamples: Of the bootstrap.
        seed: Of its draws.

    Raises:
        ValueError: Shapes that differ, scores that are no numbers, less than two samples
            that are flipped or that are not, or a k out of range.
    """
    values = torch.as_tensor(scores).detach().double().cpu().numpy()
    wrong = torch.as_tensor(flipped).detach().cpu().numpy().astype(bool)
    if values.ndim != 1 or values.shape != wrong.shape or np.isnan(values).any():
        remedy = "one number for each sample"
        raise ValueError(message("scores", f"numbers {wrong.shape}", values.shape, remedy))
    if not 2 <= wrong.sum() <= len(wrong) - 2:
        remedy = "an interval needs some"
        raise ValueError(message("flipped", "two of either kind", int(wrong.sum()), remedy))
    chosen = [int(wrong.sum())] if k is None else [int(n) for n in k]
    if not all(0 < n <= len(values) for n in chosen):
        remedy = "how many are looked at"
        raise ValueError(message("k", f"numbers from 1 to {len(values)}", chosen, remedy))
    above, below = values[wrong], values[~wrong]
    found = stats.bootstrap(
        (above, below), _area, vectorized=True, n_resamples=resamples, batch=100,
        confidence_level=confidence, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    interval = (float(found.low), float(found.high))
    precision = {n: _precision(values, wrong, n) for n in chosen}
    return AUROCResult(float(_area(above, below, -1)), interval, precision)


def _area(above: Any, below: Any, axis: int) -> Any:
    pairs = above.shape[axis] * below.shape[axis]
    return stats.mannwhitneyu(above, below, axis=axis, method="asymptotic").statistic / pairs


def _precision(values: Any, wrong: Any, k: int) -> float:
    last = np.sort(values)[-k]
    over, tied = values > last, values == last
    share = (k - over.sum()) / tied.sum()
    return float((wrong[over].sum() + share * wrong[tied].sum()) / k)
