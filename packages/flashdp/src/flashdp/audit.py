"""An audit of the noise that is really drawn: a lower bound on epsilon from its outputs alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from dp_accounting import get_epsilon_gaussian
from scipy import stats

from flashdp._checks import check_fraction, check_real, check_whole

if TYPE_CHECKING:
    from flashdp.noise import NoiseSource

__all__ = ["AuditResult", "audit_mechanism"]

_PER_CALL = 1000


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        epsilon: What the mechanism claims, for one step that every unit is in.
        epsilon_lower: What its outputs show, at ``confidence``. Above ``epsilon``, the mechanism
            is broken.
        delta: Of both.
        confidence: Of the lower bound.
        trials: Outputs with and without the canary, each.
        threshold: Score above which an output was taken to hold the canary.
        true_positive: Fraction of outputs with the canary above it, in the half that was counted.
        false_positive: Fraction of those without.
    """

    epsilon: float
    epsilon_lower: float
    delta: float
    confidence: float
    trials: int
    threshold: float
    true_positive: float
    false_positive: float

    @property
    def passed(self) -> bool:
        """Whether the outputs are compatible with the claim."""
        return self.epsilon_lower <= self.epsilon


def audit_mechanism(
    noise: NoiseSource,
    *,
    noise_multiplier: float,
    delta: float,
    max_grad_norm: float = 1.0,
    trials: int = 5000,
    confidence: float = 0.95,
) -> AuditResult:
    """Attack one step of the Gaussian mechanism, as strongly as its noise allows.

    A Dirac canary, one coordinate of size C, is as far as one unit can move a sum, and whoever
    knows the coordinate sees it best by looking there alone. Coordinates have noise of their own,
    so each one is a trial. Half of the trials choose the threshold. The other half gives
    Clopper-Pearson bounds on the rates of true and false positives, hence a lower bound on their
    distance in units of a Gaussian's deviation, mu, and the epsilon of a Gaussian mechanism of
    multiplier 1/mu (Nasr et al., 2023, section 3): tight where the noise is Gaussian, as here.

    Args:
        noise: The source of the noise. Use one that trains nothing: steps from 0 on are drawn.
        noise_multiplier: sigma, as claimed.
        delta: At which epsilon is stated.
        max_grad_norm: C.
        trials: Outputs with and without the canary, each; at least 4.
        confidence: Of the lower bound, both error rates together.

    Raises:
        ValueError: A number is out of range.
    """
    check_real("noise_multiplier", noise_multiplier, "above 0", lambda v: v > 0)
    check_real("max_grad_norm", max_grad_norm, "above 0", lambda v: v > 0)
    check_fraction("delta", delta)
    check_fraction("confidence", confidence)
    check_whole("trials", trials)
    if trials < 4:
        raise ValueError(f"trials: expected at least 4, half of which choose, got {trials}")
    std = noise_multiplier * max_grad_norm
    absent = _scores(noise, 0.0, std, trials, uid=0)
    present = _scores(noise, max_grad_norm, std, trials, uid=1)
    half = trials // 2
    miss = (1 - confidence) / 2
    candidates = np.quantile(np.concatenate([absent[:half], present[:half]]), _GRID)
    distances = [_distance(absent[:half], present[:half], t, miss)[0] for t in candidates]
    threshold = float(candidates[int(np.argmax(distances))])
    mu, true_positive, false_positive = _distance(absent[half:], present[half:], threshold, miss)
    return AuditResult(
        epsilon=get_epsilon_gaussian(noise_multiplier, delta),
        epsilon_lower=get_epsilon_gaussian(1 / mu, delta) if mu > 0 else 0.0,
        delta=delta,
        confidence=confidence,
        trials=trials,
        threshold=threshold,
        true_positive=true_positive,
        false_positive=false_positive,
    )


_GRID = np.linspace(0.02, 0.98, 97)


def _scores(noise: NoiseSource, canary: float, std: float, trials: int, *, uid: int) -> np.ndarray:
    """Private sums of ``trials`` coordinates that are the canary, or zero."""
    drawn = []
    for step in range(math.ceil(trials / _PER_CALL)):
        total = torch.full((_PER_CALL,), canary)
        out = noise.noised(total, step=step, uid=uid, std=std, divisor=1.0, dtype=torch.float32)
        drawn.append(out.double().numpy())
    return np.concatenate(drawn)[:trials]


def _distance(
    absent: np.ndarray, present: np.ndarray, threshold: float, miss: float
) -> tuple[float, float, float]:
    """Lower bound on mu, and the rates of true and false positives."""
    hits, alarms = int((present > threshold).sum()), int((absent > threshold).sum())
    # Clopper-Pearson: quantiles of beta distributions.
    low = stats.beta.ppf(miss, hits, len(present) - hits + 1) if hits else 0.0
    full = alarms == len(absent)
    high = 1.0 if full else stats.beta.ppf(1 - miss, alarms + 1, len(absent) - alarms)
    mu = float(stats.norm.ppf(low) - stats.norm.ppf(high))
    return mu, hits / len(present), alarms / len(absent)
