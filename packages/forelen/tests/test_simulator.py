"""A server's queue against a step-by-step loop, and what ageing does."""

from itertools import chain, pairwise

import numpy as np
import pytest
from forelen.schedule import LengthAwareBatchSampler, Trace, padding_ratio, plan_batches, simulate


def by_steps(lengths, arrivals, choose, slots):
    """One token a step; a slot that fell free is filled at the beginning of the next."""
    left, waiting, running, ends, now = list(lengths), [], [], {}, 0
    coming = sorted(range(len(lengths)), key=lambda r: (arrivals[r], r))
    while coming or waiting or running:
        while coming and arrivals[coming[0]] <= now:
            waiting.append(coming.pop(0))
        while waiting and len(running) < slots:
            running.append(waiting.pop(choose(waiting, now)))
        for request in list(running):
            left[request] -= 1
            if not left[request]:
                running.remove(request)
                ends[request] = now + 1
        now += 1
    return [ends[r] for r in range(len(lengths))]


@pytest.mark.parametrize("policy", ["fifo", "sjf", "lpt"])
@pytest.mark.parametrize("spread", [0, 40])
def test_against_steps(policy, spread):
    rng = np.random.default_rng(3)
    lengths, arrivals = rng.integers(1, 30, 40), rng.integers(0, spread + 1, 40).astype(float)
    guess = lengths + rng.normal(0, 5, 40)
    sign = {"fifo": 0, "sjf": 1, "lpt": -1}[policy]

    def choose(waiting, now):
        keys = [(sign * guess[r] if sign else arrivals[r], arrivals[r], r) for r in waiting]
        return keys.index(min(keys))

    expected = by_steps(lengths, arrivals, choose, 5)
    found = simulate(Trace(lengths, arrivals), policy, 5, predicted=guess)
    assert found.ends.tolist() == expected
    assert found.makespan == max(expected)
    completion = np.array(expected) - arrivals
    assert found.mean_completion == pytest.approx(completion.mean())
    assert found.longest_wait == (completion - lengths).max()
    busy = lengths.sum() / (5 * (max(expected) - arrivals.min()))
    assert found.idle == pytest.approx(1 - busy)


def test_static_ageing_is_dynamic_ageing():
    """Scores taken again whenever a slot falls free order requests as one score sent once."""
    rng = np.random.default_rng(4)
    lengths, arrivals = rng.integers(1, 60, 80), np.sort(rng.uniform(0, 300, 80))
    guess, aging = lengths + rng.normal(0, 9, 80), 0.7

    def rescored(waiting, now):
        scores = [guess[r] - aging * (now - arrivals[r]) for r in waiting]
        return int(np.argmin(scores))

    dynamic = simulate(Trace(lengths, arrivals), rescored, 4)
    static = simulate(Trace(lengths, arrivals), "sjf", 4, predicted=guess, aging=aging)
    assert dynamic.order == static.order
    none = simulate(Trace(lengths, arrivals), "sjf", 4, predicted=guess)
    assert none.order != static.order
    assert static.longest_wait < none.longest_wait


def turns_by_steps(lengths, arrivals, guess, slots, turn, resume, aging):
    """One token a step; every answer is a record that is waiting, running or done."""
    longest = max(turn, guess.max())
    records = [
        {
            "r": r,
            "made": 0,
            "place": False,
            "had": 0,
            "hold": 0,
            "since": arrivals[r],
            "came": 0,
            "end": None,
        }
        for r in range(len(lengths))
    ]

    def key(x):
        score = guess[x["r"]] + x["made"] // turn * longest + aging * x["since"]
        return (score, x["since"], x["r"])

    now = pauses = came = 0
    while any(x["end"] is None for x in records):
        there = [x for x in records if x["end"] is None and arrivals[x["r"]] <= now]
        for x in sorted((x for x in there if not x["place"]), key=key):
            inside = [x for x in there if x["place"]]
            if len(inside) == slots:
                over = [o for o in inside if o["had"] >= turn and o["made"] - x["made"] >= turn]
                if not over:
                    break
                out = max(over, key=lambda o: (o["made"], o["came"]))
                out.update(place=False, had=0, since=now)
                pauses += 1
            came += 1
            x.update(place=True, had=0, hold=resume if x["made"] else 0, came=came)
        now += 1
        for x in there:
            if x["place"] and x["hold"]:
                x["hold"] -= 1
            elif x["place"]:
                x["made"] += 1
                x["had"] += 1
                if x["made"] == lengths[x["r"]]:
                    x.update(place=False, end=now)
    return [x["end"] for x in records], pauses


@pytest.mark.parametrize(("turn", "resume", "aging"), [(7, 0, 0.0), (7, 2, 0.0), (12, 1, 0.5)])
@pytest.mark.parametrize("spread", [0, 60])
def test_turns_against_steps(turn, resume, aging, spread):
    rng = np.random.default_rng(7)
    lengths, arrivals = rng.integers(1, 50, 40), rng.integers(0, spread + 1, 40).astype(float)
    guess = np.maximum(1, lengths + rng.normal(0, 20, 40))
    expected, pauses = turns_by_steps(lengths, arrivals, guess, 5, turn, resume, aging)
    found = simulate(
        Trace(lengths, arrivals), "turns", 5, predicted=guess, turn=turn, resume=resume, aging=aging
    )
    assert found.ends.tolist() == expected
    assert found.pauses == pauses > 10


def test_turns_do_without_good_predictions():
    """All is done soon whatever was predicted; a turn as long as any answer pauses none."""
    rng = np.random.default_rng(8)
    ratios = {"right": [], "shuffled": []}
    for _ in range(20):
        lengths = np.where(rng.random(64) < 0.25, 512, np.minimum(rng.geometric(1 / 90, 64), 512))
        trace = Trace.at_once(lengths)
        plain = simulate(trace, "fifo", 16).makespan
        for name, guess in (("right", lengths), ("shuffled", rng.permutation(lengths))):
            found = simulate(trace, "turns", 16, predicted=guess)
            ratios[name].append(found.makespan / plain)
        whole = simulate(trace, "turns", 16, predicted=lengths, turn=512)
        assert whole.pauses == 0
        assert whole.ends.tolist() == simulate(trace, "sjf", 16, predicted=lengths).ends.tolist()
    assert np.mean(ratios["right"]) < 0.9
    assert np.mean(ratios["shuffled"]) < 0.9


def test_gains_vanish_when_predictions_are_shuffled():
    rng = np.random.default_rng(5)
    ratios = {"right": [], "shuffled": []}
    for _ in range(30):
        lengths = rng.geometric(1 / 100, 200)
        trace = Trace.at_once(lengths)
        plain = simulate(trace, "fifo", 16)
        for name, guess in (("right", lengths), ("shuffled", rng.permutation(lengths))):
            found = simulate(trace, "sjf", 16, predicted=guess)
            ratios[name].append(found.mean_completion / plain.mean_completion)
    assert np.mean(ratios["right"]) < 0.75
    assert abs(np.mean(ratios["shuffled"]) - 1) < 0.05


def test_bad_input():
    trace = Trace.at_once(np.array([3, 4]))
    with pytest.raises(ValueError, match="predicted"):
        simulate(trace, "sjf", 2)
    with pytest.raises(ValueError, match="policy"):
        simulate(trace, "random", 2)
    with pytest.raises(ValueError, match="slots"):
        simulate(trace, "fifo", 0)
    with pytest.raises(ValueError, match="turn"):
        simulate(trace, "turns", 2, predicted=trace.lengths, turn=0)
    with pytest.raises(ValueError, match="predicted"):
        simulate(trace, "turns", 2)
    assert simulate(Trace.at_once(np.array([], dtype=int)), "fifo", 2).makespan == 0


def test_a_sampler_of_batches():
    import torch
    from forelen import Bins, LengthDistribution
    from torch.utils.data import DataLoader

    bins = Bins(tuple(map(float, range(65))))
    lengths = np.random.default_rng(0).integers(1, 65, 60)
    law = LengthDistribution(torch.eye(64).double()[lengths - 1], bins)
    sampler = LengthAwareBatchSampler(law, 8)
    batches = list(DataLoader(list(range(60)), batch_sampler=sampler, collate_fn=list))
    assert len(sampler) == len(batches) == 8
    assert sorted(chain.from_iterable(batches)) == list(range(60))
    plain = [list(range(low, min(60, low + 8))) for low in range(0, 60, 8)]
    assert padding_ratio(batches, lengths) < 0.5 * padding_ratio(plain, lengths)
    windows = list(LengthAwareBatchSampler(law, 8, window=20))
    assert all(max(batch) // 20 == min(batch) // 20 for batch in windows)
    assert sorted(chain.from_iterable(windows)) == list(range(60))
    budget = plan_batches(law, 60, token_budget=300)
    assert all(len(b) == 1 or len(b) * lengths[b].max() <= 300 for b in budget)
    assert sorted(chain.from_iterable(budget)) == list(range(60))
    # fewest batches that the budget allows: longest first, one could not be filled further
    for first, second in pairwise(budget):
        assert (len(first) + len(second)) * lengths[first + second].max() > 300
