"""A monitor keeps quiet while nothing changes, and speaks when something does."""

import pytest
import torch
from forelen import Bins, Calibration, DriftMonitor, LengthDistribution

BINS = Bins(tuple(map(float, range(61))))


def answers(count, mean, seed, siblings=4):
    """Predictions that stay as they were, and answers of another mean, to ``count`` prompts."""
    x = torch.arange(1, 61).double()
    predicted = (-x / 12).softmax(-1)
    law = (-x / mean).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    lengths = 1 + torch.multinomial(law, count * siblings, replacement=True, generator=generator)
    found = LengthDistribution(predicted.expand(len(lengths), -1), BINS)
    return found, lengths, torch.arange(count).repeat_interleave(siblings)


@pytest.mark.parametrize("calibrated", [False, True])
def test_false_alarms_are_as_rare_as_promised(calibrated):
    alarms = 0
    for seed in range(60):
        known = Calibration.fit(*answers(60, 12, 1000 + seed)) if calibrated else None
        monitor = DriftMonitor(known, seed=seed)
        monitor.observe(*answers(60, 12, seed))
        alarms += monitor.is_stale(0.1)
    assert alarms <= 13


def test_a_change_is_noticed_and_mended():
    monitor = DriftMonitor(Calibration.fit(*answers(200, 12, 0)), window=200)
    assert not monitor.is_stale()
    monitor.observe(*answers(200, 12, 1))
    assert not monitor.is_stale()
    monitor.observe(*answers(200, 20, 2))
    assert len(monitor) == 200
    assert monitor.is_stale()
    found, lengths, _ = answers(400, 20, 3)
    before = (lengths <= found.quantile(0.9)).double().mean()
    again = monitor.recalibrate()
    assert not monitor.is_stale()
    served = LengthDistribution(found.pmf, BINS, calibration=again)
    after = (lengths <= served.quantile(0.9)).double().mean()
    assert float(before) < 0.82
    assert 0.86 < float(after) < 0.95


def test_bad_input():
    with pytest.raises(ValueError, match="window"):
        DriftMonitor(window=1)
    with pytest.raises(ValueError, match="observe first"):
        DriftMonitor().recalibrate()
    found, lengths, groups = answers(3, 12, 0)
    with pytest.raises(ValueError, match="12 lengths"):
        DriftMonitor().observe(found, lengths[:4], groups)
