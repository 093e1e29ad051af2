"""Reports against loops."""

import numpy as np
import pytest
import torch
from forelen import Bins, LengthDistribution
from forelen.metrics import covered, evaluate, sibling_floor

LENGTHS = torch.tensor([3, 5, 4, 20, 20, 26, 9, 9, 30, 11, 12, 30])
GROUPS = torch.arange(4).repeat_interleave(3)


def make(seed=0):
    bins = Bins(tuple(map(float, range(41))))
    generator = torch.Generator().manual_seed(seed)
    pmf = (2 * torch.randn(12, 40, generator=generator, dtype=torch.float64)).softmax(-1)
    return LengthDistribution(pmf, bins)


def test_the_floor():
    errors = []
    for group in range(4):
        own = LENGTHS[group == GROUPS].tolist()
        for place, value in enumerate(own):
            errors.append(abs(value - np.median(own[:place] + own[place + 1 :])))
    assert sibling_floor(LENGTHS, GROUPS) == pytest.approx(np.mean(errors))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert sibling_floor(LENGTHS[order], GROUPS[order]) == pytest.approx(np.mean(errors))
    assert sibling_floor(LENGTHS, torch.arange(12)) is None


@pytest.mark.parametrize("cap", [None, 30])
def test_against_loops(cap):
    found = make()
    report = evaluate(found, LENGTHS, GROUPS, constant=11.0, cap=cap)
    top = cap or 40
    medians, crps, squares = [], [], []
    for row, y in enumerate(LENGTHS.tolist()):
        p = found.pmf[row].numpy()
        cdf = p.cumsum()
        medians.append(min(top, int((cdf < 0.5 - 1e-12).sum()) + 1))
        # E|X - y| - E|X - X'| / 2, the other formula of the score
        x = np.minimum(np.arange(1, 41), top)
        spread = (p[:, None] * p[None] * abs(x[:, None] - x[None])).sum()
        crps.append((p * abs(x - y)).sum() - spread / 2)
        squares.append((float((p * x).sum()) - y) ** 2)
    y = LENGTHS.numpy()
    errors = abs(np.array(medians) - y)
    assert report.mae == pytest.approx(errors.mean())
    assert report.crps == pytest.approx(np.mean(crps), rel=1e-9)
    assert report.rmse == pytest.approx(np.mean(squares) ** 0.5)
    assert report.constant == pytest.approx(abs(y - 11).mean())
    assert report.floor == pytest.approx(sibling_floor(LENGTHS, GROUPS))
    assert report.explained == pytest.approx(
        (report.constant - report.mae) / (report.constant - report.floor)
    )
    assert report.mae_interval[0] < report.mae < report.mae_interval[1]
    assert (report.answers, report.prompts) == (12, 4)
    low, high = found.interval(0.2)
    inside = ((low <= LENGTHS) & (high.clamp(max=top) >= LENGTHS)).double().mean()
    assert report.within["0.8"] == pytest.approx(float(inside))
    cdf = torch.nn.functional.pad(found.pmf.cumsum(1), (1, 0))
    shares = []
    for row, y in enumerate(LENGTHS.tolist()):
        low, high = float(cdf[row, y - 1]), float(cdf[row, y])
        draws = np.linspace(low, high, 20_001)
        shares.append(((draws > 0.1) & (draws <= 0.9)).mean())
    assert report.coverage["0.8"] == pytest.approx(np.mean(shares), abs=1e-4)
    assert report.coverage["0.8"] <= report.within["0.8"]


def test_coverage_is_exact_though_answers_are_stopped_and_short():
    """Plain counts are not: most answers here are one, two, or stopped at eight tokens."""
    bins = Bins(tuple(map(float, range(41))))
    generator = torch.Generator().manual_seed(2)
    pmf = torch.rand(6, 40, generator=generator, dtype=torch.float64)
    pmf[:, :2] += 9
    pmf = (pmf / pmf.sum(1, keepdim=True)).repeat_interleave(4000, 0)
    lengths = 1 + torch.multinomial(pmf, 1, replacement=True, generator=generator).flatten()
    stopped = lengths > 8
    right = LengthDistribution(pmf, bins)
    groups = torch.arange(6).repeat_interleave(4000)
    report = evaluate(
        right, lengths.clamp(max=8), groups, constant=8.0, cap=8, censored=stopped, resamples=5
    )
    for nominal, share in report.coverage.items():
        # three standard errors of 24 000 answers
        assert share == pytest.approx(float(nominal), abs=0.01)
    assert report.within["0.8"] > 0.9
    # a length that was thought impossible is inside the interval or not
    pmf = torch.zeros(2, 40, dtype=torch.float64)
    pmf[:, [0, 39]] = 0.5
    certain = LengthDistribution(pmf, bins)
    assert covered(certain, torch.tensor([20, 20]), 0.8).tolist() == [1, 1]
    pmf[:, [0, 39]] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    certain = LengthDistribution(pmf, bins)
    assert covered(certain, torch.tensor([20, 40]), 0.8).tolist() == [0, pytest.approx(0.8)]


def test_a_right_predictor_is_covered_and_a_better_one_scores_better():
    bins = Bins(tuple(map(float, range(41))))
    generator = torch.Generator().manual_seed(1)
    pmf = (2 * torch.randn(50, 40, generator=generator, dtype=torch.float64)).softmax(-1)
    lengths = 1 + torch.multinomial(pmf, 40, replacement=True, generator=generator).flatten()
    groups = torch.arange(50).repeat_interleave(40)
    right = LengthDistribution(pmf.repeat_interleave(40, 0), bins)
    flat = LengthDistribution(torch.full_like(right.pmf, 1 / 40), bins)
    a, b = (evaluate(d, lengths, groups, constant=20.0, resamples=50) for d in (right, flat))
    assert a.mae < b.mae
    assert a.crps < b.crps
    assert a.pinball < b.pinball
    assert a.kendall > 0.2
    assert abs(b.kendall) < 1e-9
    assert a.coverage["0.9"] == pytest.approx(0.9, abs=0.02)


def test_bad_input():
    found = make()
    with pytest.raises(ValueError, match="12 lengths"):
        evaluate(found, LENGTHS[1:], GROUPS, constant=3.0)
    with pytest.raises(ValueError, match="lengths"):
        evaluate(found[[]], LENGTHS[:0], GROUPS[:0], constant=3.0)
