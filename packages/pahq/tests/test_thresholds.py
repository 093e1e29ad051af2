"""Searches with several thresholds."""

import sys
from pathlib import Path

import pytest
import torch
from pahq import CircuitFinder, sweep
from pahq.evaluation import auc_roc

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import lively, pairs

THRESHOLDS = [2e-3, 1e-1, 1e-4, 2e-2]


def test_each_is_what_a_search_alone_finds(tmp_path):
    finder, task = CircuitFinder(lively("llama")), pairs()
    found = sweep(finder, task, THRESHOLDS, resume_from=tmp_path / "run", progress=False)
    alone = [finder.acdc(task, threshold, progress=False) for threshold in THRESHOLDS]
    for threshold, mine, other in zip(THRESHOLDS, found, alone, strict=True):
        assert torch.equal(mine.present, other.present)
        assert mine.provenance["threshold"] == threshold
    assert len({len(circuit) for circuit in found}) == len(THRESHOLDS)
    batches = [sum(c.provenance["batches"] for c in circuits) for circuits in (found, alone)]
    assert batches[0] < batches[1]
    # a folder for each, from which it goes on
    assert sorted(float(path.name) for path in (tmp_path / "run").iterdir()) == sorted(THRESHOLDS)
    again = sweep(finder, task, THRESHOLDS, resume_from=tmp_path / "run", progress=False)
    assert [c.provenance for c in again] == [c.provenance for c in found]
    assert 0.5 < auc_roc(found, found[0]).area <= 1


@pytest.mark.parametrize(("thresholds", "options", "match"), [
    ([], {}, "thresholds: expected different ones"), ([0.1, 0.1], {}, "different ones"),
    ([0.1, -1.0], {}, "positive numbers"), ([0.1, float("nan")], {}, "positive numbers"),
    ([0.1], {"expect": None}, "expect"),
])  # fmt: skip
def test_bad_input(thresholds, options, match):
    with pytest.raises(ValueError, match=match):
        sweep(None, None, thresholds, **options)
