"""Distributions against enumeration and simulation."""

import numpy as np
import pytest
import torch
from forelen import Bins, Calibration, LengthDistribution

F64 = torch.float64
BINS = Bins.log1p(10, 40, tail=6.0)


def make(count=3, bins=BINS, seed=0, **options):
    logits = 2 * torch.randn(
        count, len(bins), generator=torch.Generator().manual_seed(seed), dtype=F64
    )
    return LengthDistribution(logits.softmax(-1), bins, **options)


def law(found, last=400):
    grid = torch.arange(last, dtype=F64).expand(len(found), -1)
    return found.cdf(grid).diff(dim=1)


def test_against_enumeration():
    found = make()
    pmf = law(found)
    lengths = torch.arange(1, 400, dtype=F64)
    torch.testing.assert_close(pmf.sum(1), torch.ones(3, dtype=F64))
    torch.testing.assert_close(found.mean(), pmf @ lengths)
    cdf = pmf.cumsum(1)
    for tau in (0.01, 0.25, 0.5, 0.9, 0.99):
        expected = (cdf < tau - 1e-12).sum(1) + 1
        assert found.quantile(tau).tolist() == expected.tolist()
    assert found.median().tolist() == found.quantile(0.5).tolist()
    low, high = found.interval(0.2)
    assert low.tolist() == found.quantile(0.1).tolist()
    assert high.tolist() == found.quantile(0.9).tolist()
    torch.testing.assert_close(found.sf(torch.full((3,), 7)), 1 - cdf[:, 6])


def test_the_largest_of_several():
    found = make()
    cdf = law(found).cumsum(1)
    expected = 0.0
    grid = range(120)
    a, b, c = (law(found)[row] for row in range(3))
    for x in grid:
        for y in grid:
            # the third is summed over at once
            top = max(x, y) + 1
            below = float(cdf[2, top - 1])
            above = float((c[top:] * torch.arange(top + 1, 400, dtype=F64)).sum())
            expected += float(a[x] * b[y]) * (top * below + above)
    assert float(found.expected_max()) == pytest.approx(expected, rel=1e-5)
    groups = found.expected_max([[0], [1, 2], [0, 1, 2]])
    assert float(groups[0]) == pytest.approx(float(found.mean()[0]), rel=1e-6)
    draws = np.random.default_rng(0)
    samples = [draws.choice(np.arange(1, 400), 100_000, p=(p / p.sum()).numpy()) for p in (b, c)]
    most = np.maximum(*samples)
    assert abs(float(groups[1]) - most.mean()) < 4 * most.std() / 100_000**0.5


def test_what_remains():
    found = make()
    pmf = law(found)
    lengths = torch.arange(1, 400, dtype=F64)
    for seen in (0, 1, 17, 60):
        ahead = lengths > seen
        expected = (pmf[:, ahead] @ (lengths[ahead] - seen)) / pmf[:, ahead].sum(1)
        torch.testing.assert_close(found.remaining(torch.full((3,), seen)), expected)


def test_tokens_that_are_there_already():
    plain, moved = make(), make(offset=torch.tensor([0, 5, 100]))
    assert (moved.mean() - plain.mean()).tolist() == pytest.approx([0, 5, 100])
    assert (moved.quantile(0.7) - plain.quantile(0.7)).tolist() == [0, 5, 100]
    assert moved[1:].mean().tolist() == moved.mean()[1:].tolist()
    assert float(moved.expected_max([[2]])) == pytest.approx(float(moved.mean()[2]), rel=1e-6)


def test_real_bins():
    bins = Bins.linear(4, 10.0, 50.0)
    found = LengthDistribution(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), bins)
    assert float(found.mean()) == pytest.approx(35)
    assert float(found.quantile(0.2)) == pytest.approx(25)
    assert float(found.quantile(0.8)) == pytest.approx(45)


def test_bad_input():
    with pytest.raises(ValueError, match="rows of probabilities"):
        LengthDistribution(torch.ones(2, len(BINS)), BINS)
    with pytest.raises(ValueError, match="pmf: expected shape"):
        LengthDistribution(torch.ones(2, 3) / 3, BINS)
    with pytest.raises(ValueError, match="tau"):
        make().quantile(1.0)


# -- calibration ---------------------------------------------------------------------------------


def answers(prompts, each, rng, wrong=1.0):
    """A predictor that is wrong by a factor, on answers of prompts with means of their own."""
    bins = Bins.log1p(48, 400, tail=60.0)
    means = rng.uniform(10, 60, prompts).repeat(each)
    # answers to a prompt share luck
    luck = rng.gamma(4, 0.25, prompts).repeat(each)
    lengths = 1 + rng.poisson(means * luck)
    grid = np.arange(0, 2000)
    rows = []
    for mean in means:
        density = np.exp(-grid / (wrong * mean))
        density /= density.sum()
        cumulated = np.concatenate([[0.0], density.cumsum()])
        edges = np.array(bins.edges).astype(int)
        inner = cumulated[edges[1:]] - cumulated[edges[:-1]]
        rows.append([*inner, 1 - inner.sum()])
    found = LengthDistribution(torch.tensor(np.array(rows)).clamp(min=0), bins)
    return found, torch.from_numpy(lengths), torch.arange(prompts).repeat_interleave(each)


def test_coverage_on_new_prompts():
    """Two hundred times: held-out prompts calibrate, one new prompt is covered or not."""
    rng = np.random.default_rng(1)
    covered = {0.5: 0, 0.8: 0, 0.95: 0}
    raw = 0
    for _ in range(200):
        found, lengths, groups = answers(41, 2, rng, wrong=0.5)
        held = groups < 40
        calibration = Calibration.fit(found[held], lengths[held], groups[held])
        new = found[~held]
        raw += float((lengths[~held] <= new.quantile(0.8)).double().mean())
        new.calibration = calibration
        for tau in covered:
            covered[tau] += float((lengths[~held] <= new.quantile(tau)).double().mean())
    for tau, count in covered.items():
        # at least tau, and at most 1 / 41 more, by the theorem; four standard errors of 200 draws
        error = 4 * (tau * (1 - tau) / 200) ** 0.5
        assert tau - error <= count / 200 <= tau + 1 / 41 + error
    assert raw / 200 < 0.7


def test_intervals_leave_out_no_more_than_they_say_at_either_end():
    rng = np.random.default_rng(3)
    below = above = 0.0
    for _ in range(300):
        found, lengths, groups = answers(31, 2, rng, wrong=0.5)
        held = groups < 30
        new = found[~held]
        new.calibration = Calibration.fit(found[held], lengths[held], groups[held])
        low, high = new.interval(0.5)
        below += float((lengths[~held] < low).double().mean())
        above += float((lengths[~held] > high).double().mean())
    error = 3 * (0.25 * 0.75 / 300) ** 0.5
    assert below / 300 <= 0.25 + error
    assert above / 300 <= 0.25 + error


def test_equals_the_order_statistic():
    """With one answer for each prompt it is the ceil(tau (m + 1))-th level."""
    rng = np.random.default_rng(2)
    found, lengths, groups = answers(37, 1, rng)
    calibration = Calibration.fit(found, lengths, groups)
    levels = sorted(calibration.levels)
    for tau in (0.1, 0.5, 0.9, 0.97):
        k = int(np.ceil(tau * 38 - 1e-9))
        assert calibration.level(tau) == (levels[k - 1] if k <= 37 else 1.0)
        k = int(np.floor(tau * 38 + 1e-9))
        assert calibration.level(tau, lower=True) == levels[k - 1]
    assert calibration.level(0.99) == 1.0
    assert calibration.level(0.02, lower=True) == 0.0
    found.calibration = calibration
    assert found.levels(0.2) == (levels[2], levels[34])
    assert found.interval(0.2)[0].tolist() == found._inverse(levels[2]).tolist()
    with pytest.raises(ValueError, match=r"alpha.*1\.5"):
        found.interval(1.5)
    low, high = calibration.coverage_bounds(0.5)
    assert low < 0.5 < high
    again = Calibration.from_dict(calibration.to_dict())
    assert again == calibration
    with pytest.raises(ValueError, match="sorted levels"):
        Calibration.from_dict({**calibration.to_dict(), "prompts": 99})
    with pytest.raises(ValueError, match="a length and a prompt"):
        Calibration.fit(found, lengths[1:], groups)


def test_stopped_answers_have_levels_above_where_they_stopped():
    """Of a predictor that is right, levels are uniform whether answers were stopped or not."""
    rng = np.random.default_rng(4)
    found, _, groups = answers(500, 1, rng)
    lengths = torch.multinomial(found.tokens(1000), 1, generator=torch.Generator().manual_seed(0))
    lengths = 1 + lengths[:, 0]
    cap = int(lengths.double().quantile(0.7))
    stopped = lengths > cap
    cut = lengths.clamp(max=cap)
    calibration = Calibration.fit(found, cut, groups, censored=stopped)
    # Kolmogorov: a right predictor is further off in one of 1500 draws
    gap = np.abs(np.array(calibration.levels) - (np.arange(500) + 0.5) / 500).max()
    assert gap < 2 / 500**0.5
    assert float(stopped.double().mean()) > 0.2


@pytest.mark.peer
def test_levels_are_those_of_crepes():
    crepes = pytest.importorskip("crepes")
    levels = np.random.default_rng(0).random(157)
    theirs = crepes.ConformalRegressor()
    theirs.fit(residuals=levels)
    ours = Calibration(tuple(np.sort(levels).tolist()), (1.0,) * 157, 157)
    for tau in (0.05, 0.1, 0.5, 0.8, 0.9, 0.95, 0.99):
        half = theirs.predict_int(y_hat=np.zeros(1), confidence=tau)[0, 1]
        assert ours.level(tau) == half
    # more than so many can promise
    assert ours.level(0.999) == 1.0
    assert np.isinf(theirs.predict_int(y_hat=np.zeros(1), confidence=0.999)[0, 1])
