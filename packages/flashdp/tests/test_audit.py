"""The audit brackets the noise that is drawn, and says so when there is too little of it."""

from __future__ import annotations

import math
from dataclasses import replace

import flashdp.noise
import numpy as np
import pytest
import torch
from dp_accounting import get_sigma_gaussian
from flashdp.audit import _largest_refuted, audit_mechanism, audit_one_run, one_run_p_value
from flashdp.noise import ClippedSum, NoiseSource
from scipy import stats

DELTA = 1e-5


class Halved(NoiseSource):
    """Half of the noise that was asked for."""

    def noised(self, sums, **kwargs):
        return super().noised((replace(s, std=s.std / 2) for s in sums), **kwargs)


@pytest.mark.parametrize("epsilon", [1.5, 2.0, 4.0])
def test_the_bound_is_below_epsilon_and_not_far(epsilon):
    sigma = get_sigma_gaussian(epsilon, DELTA)
    found = audit_mechanism(
        NoiseSource(secure=False, seed=11), noise_multiplier=sigma, delta=DELTA, max_grad_norm=0.3
    )
    assert found.epsilon == pytest.approx(epsilon, rel=1e-4)
    assert found.trials == 5000
    assert 0.6 * epsilon <= found.epsilon_lower <= epsilon, found
    assert found.passed


def test_a_small_epsilon_needs_more_trials():
    sigma = get_sigma_gaussian(1.0, DELTA)
    options = {"noise_multiplier": sigma, "delta": DELTA}
    few = audit_mechanism(NoiseSource(secure=False, seed=2), trials=400, **options)
    many = audit_mechanism(NoiseSource(secure=False, seed=2), trials=20_000, **options)
    assert few.epsilon_lower < 0.6 <= many.epsilon_lower <= 1.0


@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0])
def test_half_the_noise_is_found_out(epsilon):
    sigma = get_sigma_gaussian(epsilon, DELTA)
    found = audit_mechanism(Halved(secure=False, seed=3), noise_multiplier=sigma, delta=DELTA)
    assert found.epsilon_lower > epsilon
    assert not found.passed


def test_the_claim_holds_for_most_seeds():
    """At 95 % confidence, at most a few of 40 bounds may lie above."""
    sigma = get_sigma_gaussian(2.0, DELTA)
    above = 0
    for seed in range(40):
        source = NoiseSource(secure=False, seed=seed)
        above += not audit_mechanism(source, noise_multiplier=sigma, delta=DELTA).passed
    assert above <= 5


@pytest.mark.parametrize(
    "wrong", [{"trials": 3}, {"delta": 0.0}, {"noise_multiplier": 0.0}, {"confidence": 1.0}]
)
def test_numbers_out_of_range_are_refused(wrong):
    options = {"noise_multiplier": 1.0, "delta": DELTA, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        audit_mechanism(NoiseSource(secure=False, seed=0), **options)


def test_noise_does_not_depend_on_what_is_drawn_together(monkeypatch):
    def drawn():
        source = NoiseSource(secure=False, seed=3)
        sizes = [3000, 5, 1, 700, 4100]
        parts = (
            ClippedSum(torch.full((n,), float(uid)), uid, 0.5, torch.bfloat16)
            for uid, n in enumerate(sizes)
        )
        return list(source.noised(parts, step=2, divisor=4.0))

    together = drawn()
    calls = []
    original = flashdp.noise.gaussian_steps
    monkeypatch.setattr(
        flashdp.noise,
        "gaussian_steps",
        lambda *a, **k: calls.append(len(a[0])) or original(*a, **k),
    )
    monkeypatch.setattr(flashdp.noise, "_TOGETHER", 3005)
    for one, other in zip(drawn(), together, strict=True):
        assert torch.equal(one, other)
    assert calls == [2, 2, 1]


# -- by a single run -------------------------------------------------------------------------------

CANARIES = 4000


def coins(seed=0, count=CANARIES):
    return np.random.default_rng(seed).random(count) < 0.5


def noised(included, std, seed=0):
    """A sum in which every canary has a coordinate of its own."""
    source = NoiseSource(secure=False, seed=seed)
    total = torch.from_numpy(included).float()
    (out,) = source.noised([ClippedSum(total, 0, std)], step=0, divisor=1.0)
    return out.numpy()


def test_one_run_of_the_right_mechanism_passes():
    claimed = 4.0
    included = coins()
    scores = noised(included, get_sigma_gaussian(claimed, DELTA))
    found = audit_one_run(scores, included, epsilon=claimed, delta=DELTA)
    assert (found.canaries, found.guesses) == (CANARIES, CANARIES // 10)
    assert 0.3 * claimed < found.epsilon_lower <= claimed, found
    assert found.passed
    assert found.p_value > 0.05


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_one_run_finds_out_noise_that_is_missing_or_a_quarter(share):
    claimed = 4.0
    included = coins(1)
    scores = noised(included, share * get_sigma_gaussian(claimed, DELTA), seed=1)
    found = audit_one_run(scores, included, epsilon=claimed, delta=DELTA)
    assert found.epsilon_lower > claimed
    assert not found.passed
    assert found.p_value < 0.05
    # All guesses right show no more than their number allows.
    assert found.epsilon_lower <= math.log(found.guesses)


def test_what_is_independent_of_the_coins_shows_nothing():
    included = coins(2)
    scores = np.random.default_rng(5).normal(size=CANARIES)
    assert audit_one_run(scores, included, epsilon=0.5, delta=DELTA).epsilon_lower == 0.0
    backwards = audit_one_run(-noised(included, 0.1), included, epsilon=0.5, delta=DELTA)
    assert backwards.correct == 0
    assert backwards.epsilon_lower == 0.0
    assert backwards.p_value == 1.0


def test_a_randomised_response_is_bracketed_at_its_confidence():
    """Answers that are right with probability q are the worst case of epsilon = logit(q)."""
    epsilon, guesses = 1.5, 500
    q = 1 / (1 + math.exp(-epsilon))
    above = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        included = coins(seed, guesses)
        answers = np.where(rng.random(guesses) < q, included, ~included)
        found = one_run_p_value(guesses, guesses, int((answers == included).sum()), epsilon, 0.0)
        above += found < 0.05
    assert above <= 12
    assert above >= 1


def test_the_p_value_is_the_tail_of_a_binomial_and_what_delta_adds():
    q = 1 / (1 + math.exp(-1.0))
    tail = sum(math.comb(20, k) * q**k * (1 - q) ** (20 - k) for k in range(18, 21))
    assert one_run_p_value(50, 20, 18, 1.0, 0.0) == pytest.approx(tail, rel=1e-9)
    below = stats.binom.cdf(17, 20, q)
    steps = [(below - stats.binom.cdf(17 - i, 20, q)) / i for i in range(1, 19)]
    expected = tail + 2 * 50 * 1e-4 * max(steps)
    assert one_run_p_value(50, 20, 18, 1.0, 1e-4) == pytest.approx(expected, rel=1e-9)
    assert one_run_p_value(50, 20, 0, 1.0, 1e-4) == 1.0
    assert one_run_p_value(50, 20, 18, 1.0, 0.9) == 1.0


@pytest.mark.parametrize(
    ("counts", "epsilon", "delta", "p_value", "lower"),
    [
        ((1000, 100, 70), 0.5, 1e-5, 0.06694927057314852, 0.46913105191650994),
        ((4000, 400, 260), 0.1, 1e-6, 0.000116098669146791, 0.44195538280887),
        ((1000, 1000, 600), 0.3, 0.0, 0.05420718855127691, 0.2974679266765937),
        ((200, 50, 50), 2.0, 1e-4, 0.006079844744260727, 2.727498013842167),
        ((4000, 200, 140), 0.7, 1e-3, 0.6287093103831252, 0.0),
    ],
)
def test_the_bound_is_that_of_jax_privacy(counts, epsilon, delta, p_value, lower):
    """Values of auditing.py of jax-privacy 2.0.0, whose root is found to 1e-6."""
    assert one_run_p_value(*counts, epsilon, delta) == pytest.approx(p_value, rel=1e-12)
    assert _largest_refuted(*counts, delta, 0.05) == pytest.approx(lower, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": [1.0]}, "length"),
        ({"included": [1, 0, 1, 0]}, "bool"),
        ({"scores": [1.0, math.nan, 2.0, 3.0]}, "NaN"),
        ({"guesses": 3}, "even"),
        ({"guesses": 6}, "at most 4"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_a_single_run_with_wrong_input_is_refused(change, words):
    given = {
        "scores": [1.0, 2.0, 3.0, 4.0], "included": [True, False, True, False],
        "epsilon": 1.0, "delta": DELTA, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        audit_one_run(given.pop("scores"), given.pop("included"), **given)
    with pytest.raises(ValueError, match="correct <= guesses"):
        one_run_p_value(3, 2, 3, 1.0, 0.0)
