"""Accounting: known values, identities, calibration, composition, state, bad input."""

import json
import math
import time

import pytest
from flashdp.accounting import (
    Accountant,
    Mechanism,
    UnattainableError,
    adaptive_split,
    calibrate,
)

# (σ, q, steps), δ = 1e-5: ε by PLD, by RDP, and by the PRV accountant's upper bound.
KNOWN = [
    ((0.8, 0.00512, 2000), 2.138, 2.641, 2.148),
    ((1.0, 0.01024, 1000), 1.876, 2.150, 1.886),
    ((1.0, 1 / 256, 1280), 0.743, 1.095, 0.753),
]
DELTA = 1e-5


def spent(kind, sigma, q, steps, **mechanism):
    accountant = Accountant(kind)
    accountant.step(Mechanism(noise_multiplier=sigma, sample_rate=q, **mechanism), steps=steps)
    return accountant


def gaussian_delta(epsilon, sigma):
    """δ(ε) of one Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, theorem 8)."""

    def normal_cdf(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    a, b = 1 / (2 * sigma), epsilon * sigma
    return normal_cdf(a - b) - math.exp(epsilon) * normal_cdf(-a - b)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "pld", "rdp", "prv"), KNOWN)
def test_known_values(run, pld, rdp, prv):
    assert spent("pld", *run).epsilon(DELTA) == pytest.approx(pld, abs=5e-4)
    assert spent("rdp", *run).epsilon(DELTA) == pytest.approx(rdp, abs=5e-4)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize(("run", "pld", "rdp", "prv"), KNOWN)
def test_opacus_agrees(run, pld, rdp, prv):
    accountants = pytest.importorskip("opacus.accountants", reason="opacus is not installed")
    sigma, q, steps = run
    theirs = {}
    for kind, their in (("rdp", accountants.RDPAccountant()), ("prv", accountants.PRVAccountant())):
        their.history = [(sigma, q, steps)]
        theirs[kind] = their.get_epsilon(delta=DELTA)
    # Opacus tries fewer Rényi orders; its PRV bound has an error of up to 0.01 added on top.
    assert spent("rdp", *run).epsilon(DELTA) == pytest.approx(theirs["rdp"], rel=0.01)
    ours = spent("pld", *run).epsilon(DELTA)
    assert theirs["prv"] == pytest.approx(prv, abs=5e-4)
    assert theirs["prv"] - 0.021 < ours < theirs["prv"]


def test_a_single_full_batch_step_is_the_gaussian_mechanism():
    for sigma in (0.7, 2.0, 10.0):
        for kind in ("poisson", "every_step"):
            accountant = spent("pld", sigma, 1.0, 1, sampling=kind)
            for epsilon in (0.1, 0.5, 2.0):
                assert accountant.delta(epsilon) == pytest.approx(
                    gaussian_delta(epsilon, sigma), rel=2e-3, abs=1e-12
                )


def test_full_batch_steps_compose_in_quadrature():
    sixteen = spent("pld", 8.0, 1.0, 16, sampling="every_step")
    assert sixteen.epsilon(DELTA) == pytest.approx(
        spent("pld", 2.0, 1.0, 1).epsilon(DELTA), rel=1e-3
    )


def test_epsilon_and_delta_are_inverse():
    for kind in ("pld", "rdp"):
        accountant = spent(kind, 1.0, 0.01, 500)
        assert accountant.delta(accountant.epsilon(1e-6)) == pytest.approx(1e-6, rel=1e-3)


def test_rdp_is_never_tighter():
    for sigma, q, steps in ((0.6, 0.001, 3000), (2.0, 0.1, 100), (5.0, 1.0, 50)):
        assert spent("rdp", sigma, q, steps).epsilon(1e-6) >= spent("pld", sigma, q, steps).epsilon(
            1e-6
        )


def test_without_noise_there_is_no_privacy():
    for kind in ("pld", "rdp"):
        accountant = spent(kind, 0.0, 0.01, 1)
        assert accountant.epsilon(DELTA) == math.inf
        assert accountant.delta(3.0) == 1.0


def test_nothing_released_costs_nothing():
    for kind in ("pld", "rdp"):
        assert Accountant(kind).epsilon(DELTA) == 0.0
        assert Accountant(kind).delta(1.0) == 0.0
        assert Accountant(kind).steps == 0


def test_hardly_any_noise_is_still_answered_soon():
    started = time.monotonic()
    epsilon = spent("pld", 0.05, 0.01, 1000).epsilon(DELTA)
    assert 1000 < epsilon < math.inf
    assert time.monotonic() - started < 60


# -- truncation ------------------------------------------------------------------------------------


def truncated(cap, n=2000):
    return {"sampling": "truncated", "dataset_size": n, "truncated_batch_size": cap}


def test_a_cap_that_is_never_reached_costs_nothing():
    plain = spent("pld", 1.0, 0.01, 200).epsilon(DELTA)
    assert spent("pld", 1.0, 0.01, 200, **truncated(60)).epsilon(DELTA) == pytest.approx(
        plain, rel=1e-4
    )


def test_a_cap_that_cuts_often_costs_more():
    costs = [spent("pld", 2.0, 0.01, 5, **truncated(cap)).epsilon(DELTA) for cap in (60, 28, 22)]
    assert costs == sorted(costs)
    assert costs[-1] > 1.1 * costs[0]


def test_orders_that_do_not_converge_are_left_out_in_silence(caplog):
    with caplog.at_level("WARNING"):
        accountant = Accountant("rdp")
        accountant.step(Mechanism(noise_multiplier=0.38, sample_rate=0.0133))
        assert 0 < accountant.epsilon(1e-5) < 20
    assert not caplog.records


def test_rdp_refuses_truncation():
    with pytest.raises(ValueError, match=r"'rdp'.*truncated.*'pld'"):
        spent("rdp", 1.0, 0.01, 200, **truncated(40))


# -- composition and state -------------------------------------------------------------------------


def test_steps_one_by_one_are_steps_at_once():
    one = Accountant("pld", Mechanism(noise_multiplier=1.0, sample_rate=0.01))
    for _ in range(50):
        one.step()
    assert one.steps == 50
    assert one.history == ((one.mechanism, 50),)
    assert one.epsilon(DELTA) == spent("pld", 1.0, 0.01, 50).epsilon(DELTA)


def test_different_mechanisms_add_up():
    first = Mechanism(noise_multiplier=1.0, sample_rate=0.01)
    second = Mechanism(noise_multiplier=0.8, sample_rate=0.02)
    mixed = Accountant("pld")
    mixed.step(first, steps=100)
    mixed.step(second, steps=50)
    alone = [spent("pld", 1.0, 0.01, 100), spent("pld", 0.8, 0.02, 50)]
    assert max(a.epsilon(DELTA) for a in alone) < mixed.epsilon(DELTA)
    assert mixed.epsilon(DELTA) < sum(a.epsilon(DELTA / 2) for a in alone)
    assert [steps for _, steps in mixed.history] == [100, 50]


def test_state_survives_json():
    mechanism = Mechanism(noise_multiplier=1.0, sample_rate=0.01, **truncated(40))
    accountant = Accountant("pld", mechanism)
    accountant.step(steps=7)
    accountant.step(Mechanism(noise_multiplier=2.0, sample_rate=1.0, sampling="every_step"))
    state = json.loads(json.dumps(accountant.state_dict(), allow_nan=False))
    again = Accountant("pld")
    again.load_state_dict(state)
    assert again.history == accountant.history
    assert again.steps == 8


def test_state_of_another_run_is_refused():
    ours = Mechanism(noise_multiplier=1.0, sample_rate=0.01)
    state = spent("pld", 1.0, 0.01, 5).state_dict()
    with pytest.raises(ValueError, match=r"'pld'.*'rdp'"):
        Accountant("rdp", ours).load_state_dict(state)
    for name, value in (("noise_multiplier", 1.1), ("sample_rate", 0.02)):
        other = Mechanism(**{"noise_multiplier": 1.0, "sample_rate": 0.01, name: value})
        with pytest.raises(ValueError, match=rf"{name} .*{value}"):
            Accountant("pld", other).load_state_dict(state)
        changed = Accountant("pld", other)
        changed.load_state_dict(state, strict=False)
        assert changed.steps == 5
    used = Accountant("pld", ours)
    used.step()
    with pytest.raises(ValueError, match="already holds 1 step"):
        used.load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"history": None},
        {"history": [{"steps": 1}]},
        {"history": [{"noise_multiplier": 1.0, "sample_rate": 0.1, "sampling": "x", "steps": 1}]},
        {"history": [{"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": -1}]},
        {"history": [{"noise_multiplier": "1", "sample_rate": 0.1, "steps": 1}]},
    ],
)
def test_damaged_state_is_refused_and_changes_nothing(damage):
    accountant = Accountant("pld")
    with pytest.raises((ValueError, TypeError), match=r"accountant|Mechanism|steps"):
        accountant.load_state_dict({**spent("pld", 1.0, 0.01, 5).state_dict(), **damage})
    assert accountant.steps == 0


def test_a_state_this_kind_cannot_account_is_refused():
    state = {**spent("pld", 1.0, 0.1, 1, **truncated(20, 100)).state_dict(), "kind": "rdp"}
    with pytest.raises(ValueError, match="truncated"):
        Accountant("rdp").load_state_dict(state)


def test_steps_within_a_budget():
    accountant = Accountant("rdp", Mechanism(noise_multiplier=1.0, sample_rate=0.01))
    accountant.step(steps=100)
    more = accountant.steps_within(1.5, DELTA, limit=10_000)
    accountant.step(steps=more)
    assert accountant.epsilon(DELTA) <= 1.5
    accountant.step()
    assert accountant.epsilon(DELTA) > 1.5
    assert accountant.steps_within(1.5, DELTA, limit=10) == 0
    assert accountant.steps_within(50.0, DELTA, limit=10) == 10


def test_a_calibrated_run_may_take_all_its_steps():
    sigma = calibrate(2.0, DELTA, sample_rate=0.1, steps=10)
    fresh = Accountant("pld", Mechanism(noise_multiplier=sigma, sample_rate=0.1))
    assert fresh.steps_within(2.0, DELTA, limit=10) == 10


# -- calibration -----------------------------------------------------------------------------------


def test_calibration_finds_the_known_value():
    run = {"sample_rate": 0.00512, "steps": 2000}
    sigma = calibrate(8.0, DELTA, **run)
    assert sigma == pytest.approx(0.5369, abs=1.01e-4)
    assert spent("pld", sigma, *run.values()).epsilon(DELTA) <= 8.0
    assert spent("pld", sigma - 2e-4, *run.values()).epsilon(DELTA) > 8.0


@pytest.mark.parametrize(
    ("epsilon", "delta", "run"),
    [
        (1.0, 1e-6, {"sample_rate": 0.02, "steps": 30}),
        (0.05, 1e-6, {"sample_rate": 0.001, "steps": 100}),
        (3.0, 1e-5, {"sample_rate": 1.0, "steps": 20, "sampling": "every_step"}),
        (50.0, 1e-5, {"sample_rate": 0.01, "steps": 50}),
        (2.0, 1e-5, {"sample_rate": 0.02, "steps": 100, "kind": "rdp"}),
        (0.5, 1e-5, {"sample_rate": 0.1, "steps": 2, **truncated(60, 400)}),
    ],
)
def test_calibration_keeps_the_promise_and_wastes_little(epsilon, delta, run):
    sigma = calibrate(epsilon, delta, **run)
    kind = run.pop("kind", "pld")
    q, steps = run.pop("sample_rate"), run.pop("steps")
    assert spent(kind, sigma, q, steps, **run).epsilon(delta) <= epsilon
    assert spent(kind, sigma * 0.997, q, steps, **run).epsilon(delta) > epsilon
    assert sigma == float(f"{sigma:.4g}")


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:Optimal order")
def test_opacus_calibrates_alike():
    opacus = pytest.importorskip("opacus.accountants.utils", reason="opacus is not installed")
    theirs = opacus.get_noise_multiplier(
        target_epsilon=3.0,
        target_delta=DELTA,
        sample_rate=0.01,
        steps=500,
        accountant="rdp",
        epsilon_tolerance=0.01,
    )
    ours = calibrate(3.0, DELTA, sample_rate=0.01, steps=500, kind="rdp")
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("bias", [0.98, 1.0, 1.02])
def test_the_fine_grid_decides_however_wrong_the_coarse_one_is(monkeypatch, bias):
    def cost(kind, history, delta, interval=1e-4):
        return (bias if interval > 1e-4 else 1.0) / history[0][0].noise_multiplier

    monkeypatch.setattr("flashdp.accounting._epsilon", cost)
    # 1/σ <= 0.7 from σ = 1.42857... on.
    assert calibrate(0.7, DELTA, sample_rate=0.1, steps=1) == 1.429


def test_what_no_noise_can_reach_is_said():
    with pytest.raises(UnattainableError, match=r"0\.001.*1e-30"):
        calibrate(1e-3, 1e-30, sample_rate=0.5, steps=1000)


def test_the_smallest_noise_is_returned_where_any_would_do(monkeypatch):
    monkeypatch.setattr("flashdp.accounting._epsilon", lambda *_: 0.0)
    assert calibrate(1.0, DELTA, sample_rate=0.1, steps=1) == 0.05


# -- the split of the budget -----------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 1.0, 7.0])
@pytest.mark.parametrize("groups", [1, 48, 1000])
@pytest.mark.parametrize("share", [0.01, 0.3])
def test_counts_and_gradients_together_are_one_mechanism(sigma, groups, share):
    gradient, counts = adaptive_split(sigma, groups, share)
    # K centred counts move by at most √K/2 together, the gradients by 1.
    assert 1 / gradient**2 + groups / 4 / counts**2 == pytest.approx(1 / sigma**2, rel=1e-12)
    assert groups / 4 / counts**2 == pytest.approx(share / sigma**2, rel=1e-12)
    assert gradient == pytest.approx((sigma**-2 - groups / (4 * counts**2)) ** -0.5)


def test_no_noise_splits_into_none():
    assert adaptive_split(0.0, 3, 0.01) == (0.0, 0.0)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"noise_multiplier": -0.1}, ValueError, "noise_multiplier: .*-0.1"),
        ({"noise_multiplier": math.nan}, ValueError, "noise_multiplier"),
        ({"noise_multiplier": None}, TypeError, "noise_multiplier"),
        ({"sample_rate": 0.0}, ValueError, "sample_rate: .*0.0"),
        ({"sample_rate": 1.1}, ValueError, "sample_rate"),
        ({"sampling": "shuffle"}, ValueError, "sampling: .*'shuffle'.*every_step"),
        ({"sampling": "truncated"}, ValueError, "dataset_size"),
        ({"sampling": "truncated", "dataset_size": 10}, ValueError, "truncated_batch_size"),
        ({"dataset_size": 10}, ValueError, "dataset_size: .*'poisson'"),
        (truncated(0), ValueError, "truncated_batch_size: .*0"),
        ({"sampling": "every_step"}, ValueError, "sample_rate: .*1"),
    ],
)
def test_mechanism_refuses(fields, error, words):
    with pytest.raises(error, match=words):
        Mechanism(**{"noise_multiplier": 1.0, "sample_rate": 0.1, **fields})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Accountant("prv"), ValueError, "'prv'.*'pld'"),
        (lambda: Accountant("pld").step(), ValueError, "mechanism"),
        (lambda: spent("pld", 1.0, 0.1, 0), ValueError, "steps: .*0"),
        (lambda: spent("pld", 1.0, 0.1, 1.5), TypeError, "steps: .*1.5"),
        (lambda: Accountant("pld").epsilon(0.0), ValueError, "delta: .*0.0"),
        (lambda: Accountant("pld").epsilon(1.0), ValueError, "delta"),
        (lambda: Accountant("pld").delta(-1.0), ValueError, "epsilon: .*-1.0"),
        (lambda: calibrate(0.0, DELTA, sample_rate=0.1, steps=1), ValueError, "epsilon"),
        (lambda: calibrate(1.0, 2.0, sample_rate=0.1, steps=1), ValueError, "delta"),
        (lambda: calibrate(1.0, DELTA, sample_rate=2, steps=1), ValueError, "sample_rate"),
        (lambda: calibrate(1.0, DELTA, sample_rate=0.1, steps=0), ValueError, "steps"),
        (lambda: adaptive_split(-1.0, 1, 0.1), ValueError, "sigma"),
        (lambda: adaptive_split(1.0, 0, 0.1), ValueError, "groups"),
        (lambda: adaptive_split(1.0, 1, 1.0), ValueError, "share"),
    ],
)
def test_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call()
