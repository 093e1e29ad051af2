"""Split-conformal calibration of quantiles, by groups of answers to one prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._checks import message

if TYPE_CHECKING:
    from torch import Tensor

    from forelen.distribution import LengthDistribution


@dataclass(frozen=True)
class Calibration:
    """The levels at which a predictor's distributions reach the lengths that came out.

    If prompts are exchangeable, an answer to a new prompt is at most the served quantile with
    probability ``tau`` at least: the quantile is taken at the ``tau (m + 1)``-th of m held-out
    levels ``u = F(y)``. Answers to one prompt are not independent, so a prompt counts once,
    shared among its answers.

    Attributes:
        levels: Sorted u of held-out answers.
        weights: The share of its prompt that each has.
        prompts: m.
    """

    levels: tuple[float, ...]
    weights: tuple[float, ...]
    prompts: int

    @classmethod
    def fit(
        cls,
        found: LengthDistribution,
        lengths: Tensor,
        groups: Tensor,
        *,
        censored: Tensor | None = None,
        seed: int = 0,
    ) -> Calibration:
        """Calibrate on answers that neither trained the predictor nor will be reported on.

        Levels are drawn within the jump of the distribution at the length, so that they are uniform
        if the predictor is right.

        Args:
            found: Uncalibrated distributions of N answers.
            lengths: int64 ``(N,)``, which came out.
            groups: int64 ``(N,)``, the prompt of each.
            censored: bool ``(N,)``, answers that were stopped: their level is drawn from all that
                lies above.
            seed: Of the draws.

        Raises:
            ValueError: No answers, or tensors that do not fit.
        """
        if not len(found) or lengths.shape != (len(found),) or groups.shape != lengths.shape:
            remedy = "give a length and a prompt for each answer"
            raise ValueError(message("lengths", f"{len(found)} lengths", lengths, remedy))
        y = lengths.double()
        upper, lower = found.cdf(y).cpu().numpy(), found.cdf(y - 1).cpu().numpy()
        if censored is not None:
            stopped = censored.cpu().numpy()
            lower, upper = np.where(stopped, upper, lower), np.where(stopped, 1.0, upper)
        draws = np.random.default_rng(seed).random(len(y))
        levels = lower + draws * (upper - lower)
        _, member, sizes = np.unique(groups.cpu().numpy(), return_inverse=True, return_counts=True)
        order = np.argsort(levels, kind="stable")
        weights = (1 / sizes)[member][order]
        return cls(tuple(levels[order].tolist()), tuple(weights.tolist()), len(sizes))

    def level(self, tau: float, *, lower: bool = False) -> float:
        """Return the level to take a predictor's quantile at.

        Args:
            tau: How much is to lie at or below it.
            lower: At most so much, as the lower end of an interval needs it: the
                ``floor(tau (m + 1))``-th level, and 0 if too few prompts were seen. Otherwise at
                least so much: the ``ceil``, and 1 if too few were.
        """
        reached = np.cumsum(self.weights)
        needed = tau * (self.prompts + 1)
        if lower:
            place = int(np.searchsorted(reached, needed + 1e-9, side="right")) - 1
            return self.levels[place] if place >= 0 else 0.0
        place = int(np.searchsorted(reached, needed - 1e-9))
        return self.levels[place] if place < len(self.levels) else 1.0

    def coverage_bounds(self, tau: float, confidence: float = 0.95) -> tuple[float, float]:
        """Return between what the true coverage lies; it varies with the held-out prompts.

        ``Beta(k, m + 1 - k)`` with ``k = ceil(tau (m + 1))``, for one answer per prompt.
        """
        from scipy.stats import beta

        k = min(self.prompts, math.ceil(tau * (self.prompts + 1) - 1e-9))
        law = beta(k, self.prompts + 1 - k)
        return float(law.ppf((1 - confidence) / 2)), float(law.ppf((1 + confidence) / 2))

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "levels": list(self.levels), "weights": list(self.weights), "prompts": self.prompts,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Calibration:
        """Make a calibration of what `to_dict` returned.

        Raises:
            ValueError: Numbers that no calibration has.
        """
        levels, weights = tuple(found["levels"]), tuple(found["weights"])
        values = torch.tensor([levels, weights], dtype=torch.float64)
        sound = (
            len(levels) > 0 and bool(values.isfinite().all()) and levels == tuple(sorted(levels))
        )
        if not sound or abs(sum(weights) - found["prompts"]) > 1e-6 * len(levels):
            raise ValueError(
                message(
                    "calibration", "sorted levels whose weights sum to the prompts", found, "fit"
                )
            )
        return cls(levels, weights, int(found["prompts"]))
