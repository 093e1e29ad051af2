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
from flashdp.noise import ClippedSum

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from flashdp.noise import NoiseSource

__all__ = ["AuditResult", "OneRunResult", "audit_mechanism", "audit_one_run", "one_run_p_value"]

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
        (out,) = noise.noised([ClippedSum(total, uid, std)], step=step, divisor=1.0)
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


@dataclass(frozen=True)
class OneRunResult:
    """What an audit by a single run found.

    Attributes:
        epsilon: What the run claims.
        epsilon_lower: What its guesses show, at ``confidence``. Above ``epsilon``, the claim is
            false.
        p_value: How likely so many right guesses are, at most, if the claim is true.
        delta: Of both.
        confidence: Of the lower bound.
        canaries: Each was in the run or not by the toss of a fair coin.
        guesses: Made; the audit abstains from the other canaries.
        correct: Right ones.
    """

    epsilon: float
    epsilon_lower: float
    p_value: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int

    @property
    def passed(self) -> bool:
        """Whether the guesses are compatible with the claim."""
        return self.epsilon_lower <= self.epsilon


def audit_one_run(
    scores: ArrayLike,
    included: ArrayLike,
    *,
    epsilon: float,
    delta: float,
    guesses: int | None = None,
    confidence: float = 0.95,
) -> OneRunResult:
    """Bound epsilon from below by one training run with many canaries (Steinke et al., 2023).

    Before the run, each canary is put into the data by the toss of a fair coin of its own; after
    it, each gets a score that tends to be higher for those that were in: a canary's loss with its
    sign changed, or the inner product of its gradient with the updates. Those with the highest
    scores are guessed to have been in, as many with the lowest to have been out.

    Nothing is assumed of scores or canaries, and the number of guesses has to be chosen before
    coins are looked at. The bound is that of (epsilon, delta) for any mechanism, so that for
    Gaussian noise it stays well below: it proves mistakes, not tightness. ``delta`` has to be far
    below one over the canaries, and no more can be shown than about log(guesses / 3).

    Args:
        scores: Real numbers (canaries,); NaN is an error.
        included: bool (canaries,), the coins.
        epsilon: What the run claims for each canary.
        delta: Its delta.
        guesses: Even number of canaries to guess about; default: a tenth, at least two.
        confidence: Of the lower bound.

    Raises:
        ValueError: The arrays do not fit together, or a number is out of range.
    """
    check_real("epsilon", epsilon, "of at least 0", lambda v: v >= 0)
    check_fraction("delta", delta)
    check_fraction("confidence", confidence)
    points, coins = np.asarray(scores, dtype=np.float64), np.asarray(included)
    if points.ndim != 1 or coins.shape != points.shape or coins.dtype != np.bool_:
        raise ValueError(
            "expected scores and coins (bool) of one and the same length, got shapes "
            f"{points.shape} and {coins.shape}, dtype {coins.dtype}"
        )
    if np.isnan(points).any():
        raise ValueError(f"scores: expected numbers, {int(np.isnan(points).sum())} are NaN")
    count = len(points)
    if guesses is None:
        guesses = max(2, count // 20 * 2)
    check_whole("guesses", guesses)
    if guesses % 2 or guesses > count:
        raise ValueError(f"guesses: expected an even number, at most {count}, got {guesses}")
    order, half = np.argsort(points, kind="stable"), guesses // 2
    correct = int(coins[order[-half:]].sum() + (~coins[order[:half]]).sum())
    miss = 1 - confidence
    return OneRunResult(
        epsilon=epsilon,
        epsilon_lower=_largest_refuted(count, guesses, correct, delta, miss),
        p_value=one_run_p_value(count, guesses, correct, epsilon, delta),
        delta=delta,
        confidence=confidence,
        canaries=count,
        guesses=guesses,
        correct=correct,
    )


def one_run_p_value(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """Bound the chance of so many right guesses under (epsilon, delta).

    With delta = 0 right guesses are at most as many as those of a randomised response, binomial
    with q = 1 / (1 + exp(-epsilon)). A delta adds 2 m delta max_i P[v - i <= Binomial < v] / i
    (Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", arXiv:2305.08846,
    appendix D).

    Args:
        canaries: m.
        guesses: r, of them.
        correct: v, of those.
        epsilon: At least 0.
        delta: At least 0.

    Raises:
        ValueError: Not 0 <= correct <= guesses <= canaries.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"expected 0 <= correct <= guesses <= canaries, got {correct}, {guesses} and {canaries}"
        )
    q = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, q))
    extra = 0.0
    if correct:
        below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, q))
        extra = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * extra)


def _largest_refuted(canaries: int, guesses: int, correct: int, delta: float, miss: float) -> float:
    """Largest epsilon at which the guesses would be less likely than ``miss``; at least 0."""

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) < miss

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
