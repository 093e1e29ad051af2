"""Order and batches against enumeration."""

import itertools

import numpy as np
import pytest
import torch
from forelen import Bins, LengthDistribution, gittins_index, plan_batches, priority

F64 = torch.float64
BINS = Bins.log1p(8, 20, tail=3.0)


def make(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LengthDistribution(
        (2 * torch.randn(count, len(BINS), generator=generator, dtype=F64)).softmax(-1), BINS
    )


def test_the_index_by_enumeration():
    rng = np.random.default_rng(0)
    pmf = rng.dirichlet(np.ones(9))
    for age in range(9):
        best = 0.0
        ahead = pmf[age:] / pmf[age:].sum()
        for stop in range(1, len(ahead) + 1):
            done = ahead[:stop].sum()
            served = sum(p * min(n, stop) for n, p in enumerate(ahead, 1))
            best = max(best, done / served)
        assert gittins_index(pmf, age) == pytest.approx(best, rel=1e-12)


def test_the_index_of_known_laws():
    point = np.zeros(12)
    point[9] = 1.0
    assert [gittins_index(point, age) for age in (0, 4, 9)] == pytest.approx([1 / 10, 1 / 6, 1.0])
    assert gittins_index(point, 10) == 0
    geometric = 0.1 * 0.9 ** np.arange(2000)
    found = [gittins_index(geometric, age) for age in (0, 7, 100)]
    assert found == pytest.approx([0.1] * 3, rel=1e-9)
    with pytest.raises(ValueError, match="age"):
        gittins_index(point, -1)


@pytest.mark.parametrize("objective", ["latency", "makespan"])
def test_static_priorities_order_as_scores_that_are_taken_again(objective):
    found = make(20)
    rng = np.random.default_rng(0)
    arrival = rng.uniform(0, 30, 20)
    static = np.argsort(priority(found, arrival, aging=2.0, objective=objective, scale=1e4))
    sign = 1 if objective == "latency" else -1
    for now in (30.0, 77.0, 1e4):
        score = sign * found.mean().numpy() - 2.0 * (now - arrival)
        assert np.argsort(score).tolist() == static.tolist()
    huge = priority(found, arrival + 1e12, aging=2.0)
    assert huge.max() <= 2**31 - 1
    with pytest.raises(ValueError, match="aging"):
        priority(found, arrival, aging=0.0)
    with pytest.raises(ValueError, match="objective"):
        priority(found, arrival, aging=1.0, objective="fairness")


@pytest.mark.parametrize(("count", "size"), [(1, 3), (6, 2), (7, 3), (8, 4), (9, 9)])
def test_batches_by_exhaustive_search(count, size):
    found = make(count, seed=count)
    batches = plan_batches(found, size)
    assert sorted(itertools.chain(*batches)) == list(range(count))
    assert max(map(len, batches)) <= size
    order = np.argsort(-found.mean().numpy(), kind="stable").tolist()
    assert list(itertools.chain(*batches)) == order
    needed = -(-count // size)

    def cost(parts):
        return sum(len(part) * float(found.expected_max([part])) for part in parts)

    best = min(
        cost([order[a:b] for a, b in itertools.pairwise([0, *cuts, count])])
        for cuts in itertools.combinations(range(1, count), needed - 1)
        if max(b - a for a, b in itertools.pairwise([0, *cuts, count])) <= size
    )
    assert cost(batches) == pytest.approx(best, rel=1e-9)


def test_no_answers_and_bad_sizes():
    assert plan_batches(make(3)[:0], 2) == []
    with pytest.raises(ValueError, match="batch_size"):
        plan_batches(make(3), 0)
