"""Areas and precisions against counting, and against scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from sam_if.evaluate import auroc
from sklearn.metrics import roc_auc_score


def counted(scores, flipped):
    """Pairs of a flipped sample and another, one by one."""
    pairs = [
        (a > b) + 0.5 * (a == b)
        for (a, one), (b, other) in itertools.product(zip(scores, flipped, strict=True), repeat=2)
        if one and not other
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(4))
def test_areas(seed):
    draws = np.random.default_rng(seed)
    flipped = draws.random(40) < 0.3
    # many ties
    scores = np.round(draws.normal(size=40) + flipped, 0 if seed % 2 else 3)
    found = auroc(scores, flipped, resamples=200)
    assert found.auroc == pytest.approx(counted(scores.tolist(), flipped.tolist()), abs=1e-12)
    assert found.auroc == pytest.approx(roc_auc_score(flipped, scores), abs=1e-12)
    assert found.interval[0] < found.auroc < found.interval[1]
    tensors = auroc(torch.from_numpy(scores).float(), torch.from_numpy(flipped), resamples=200)
    assert tensors.auroc == pytest.approx(found.auroc, abs=1e-6)


def test_intervals_hold_what_they_say():
    """Of 60 draws with an area of Phi(1 / sqrt 2), the interval of 80 % holds 41 to 55."""
    truth, held = 0.7602499, 0
    for seed in range(60):
        draws = np.random.default_rng(seed)
        flipped = np.arange(120) < 40
        low, high = auroc(
            draws.normal(size=120) + flipped, flipped, confidence=0.8, resamples=200
        ).interval
        held += low <= truth <= high
    assert 38 <= held <= 57


def test_precisions():
    flipped = [True, False, True, False, True]
    found = auroc([5.0, 4.0, 3.0, 2.0, 1.0], flipped, k=[1, 2, 3, 5], resamples=20)
    assert found.precision == {1: 1.0, 2: 0.5, 3: pytest.approx(2 / 3), 5: pytest.approx(3 / 5)}
    # of three that are tied for one place two are flipped
    tied = auroc([5.0, 2.0, 2.0, 2.0, 1.0], [False, True, True, False, False], k=[2], resamples=20)
    assert tied.precision == {2: pytest.approx((2 / 3) / 2)}
    assert list(
        auroc([3.0, 2.0, 1.0, 0.0], [True, False, False, True], resamples=20).precision
    ) == [2]


@pytest.mark.parametrize(
    ("scores", "flipped", "k", "match"),
    [
        ([1.0, 2.0], [True, False, False], None, "scores: expected numbers"),
        ([1.0, float("nan")], [True, False], None, "scores: expected numbers"),
        ([1.0, 2.0], [True, True], None, "flipped: expected two of either kind"),
        ([1.0, 2.0], [False, False], None, "flipped: expected two of either kind"),
        ([1.0, 2.0] * 2, [True, False] * 2, [5], "k: expected numbers from 1 to 4"),
        ([1.0, 2.0] * 2, [True, False] * 2, [0], "k: expected numbers from 1 to 4"),
    ],
)
def test_what_is_refused(scores, flipped, k, match):
    with pytest.raises(ValueError, match=match):
        auroc(scores, flipped, k)
