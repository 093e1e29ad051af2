"""The audit brackets the noise that is drawn, and says so when there is too little of it."""

from __future__ import annotations

import pytest
from dp_accounting import get_sigma_gaussian
from flashdp.audit import audit_mechanism
from flashdp.noise import NoiseSource

DELTA = 1e-5


class Halved(NoiseSource):
    """Half of the noise that was asked for."""

    def noised(self, total, *, std, **kwargs):
        return super().noised(total, std=std / 2, **kwargs)


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
