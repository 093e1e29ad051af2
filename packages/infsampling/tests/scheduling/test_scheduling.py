"""Schedules against brute force, their proven factors, and the theorem of free slots."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from infsampling.scheduling import (
    POLICIES,
    free_slots,
    lower_bound,
    order,
    parking,
    partition,
    preemptive_bound,
    schedule,
    simulate,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
EVERY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
MEASURED = json.loads((Path(__file__).parent / "smollm2_lengths.json").read_text())


def best_makespan(lengths, slots):
    """Over all ways to give each sample a slot."""
    return min(
        max(sum(n for n, s in zip(lengths, where, strict=True) if s == slot)
            for slot in range(slots))
        for where in itertools.product(range(slots), repeat=len(lengths))
    )  # fmt: skip


@EVERY
@given(lengths=LENGTHS, slots=st.integers(1, 3))
def test_bounds_and_factors(lengths, slots):
    best = best_makespan(lengths, slots)
    values = np.array(lengths, dtype=float)
    assert lower_bound(lengths, slots) <= best
    assert preemptive_bound(lengths, slots) <= lower_bound(lengths, slots)
    longest = simulate(lengths, slots, "lpt")
    assert longest.steps <= (4 / 3 - 1 / (3 * slots)) * best + 1e-9
    for epsilon in (0.5, 0.1, 0.02):
        found = partition.fptas(values, slots, epsilon)
        assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
        assert partition.load(found, values) <= (1 + epsilon) * best + 1e-9
    assert partition.load(partition.multifit(values, slots), values) <= 13 / 11 * best + 1e-9
    plan = schedule(lengths, slots)
    assert best <= plan.makespan <= 1.02 * best + 1e-9 or plan.makespan <= longest.steps
    assert plan.makespan <= (1 + plan.certificate) * best + 1e-9
    assert sorted(itertools.chain(*plan.chains)) == list(range(len(lengths)))


@EVERY
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7), slots=st.integers(1, 3))
def test_sorted_rounds_are_the_best_rounds(lengths, slots):
    count = -(-len(lengths) // slots)
    best = min(
        sum(max((n for n, r in zip(lengths, where, strict=True) if r == part), default=0)
            for part in range(count))
        for where in itertools.product(range(count), repeat=len(lengths))
        if max(where.count(part) for part in range(count)) <= slots
    )  # fmt: skip
    assert simulate(lengths, slots, "sorted_rounds").steps == best
    assert simulate(lengths, slots, "rounds").steps >= best


@EVERY
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=20), slots=st.integers(1, 6))
def test_parking_with_right_predictions_reaches_the_bound(lengths, slots):
    found = simulate(lengths, slots, "lrpt", sync_every=1, rerank_every=1, park_limit=float("inf"))
    # ranked at every step with a margin of half of one
    assert found.steps == preemptive_bound(lengths, slots)


@EVERY
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=25), slots=st.integers(1, 8),
    policy=st.sampled_from(POLICIES), seed=st.integers(0, 5), sync=st.sampled_from([1, 4]),
)  # fmt: skip
def test_every_policy_decodes_everything(lengths, slots, policy, seed, sync):
    random = np.random.default_rng(seed)
    believed = random.permutation(lengths) + random.random(len(lengths))
    groups = random.integers(0, 3, len(lengths))
    found = simulate(lengths, slots, policy, believed, groups=groups, sync_every=sync,
                     rerank_every=2 * sync, turn=5)  # fmt: skip
    work = np.array(lengths)
    assert (found.ends >= work).all()
    assert found.steps == found.ends.max()
    assert found.steps >= preemptive_bound(lengths, slots)
    # no slot is idle while a sample waits, or but until the host looks
    assert found.steps <= work.sum() / slots + work.max() + (sync + 1) * len(lengths)
    if found.steps:
        assert found.utilisation == pytest.approx(work.sum() / (found.steps * slots))
    if len(lengths) <= slots and policy not in ("lrpt", "turns"):
        assert found.steps == work.max()
        assert found.swaps == 0


def test_samples_are_parked_when_few_are_left():
    ranking = parking.Ranking("turns", np.full(6, 9.0), turn=2, limit=2.0)
    done = np.array([4, 0, 0, 0, 0, 4])
    # five are left for two slots
    assert ranking.choose([0, 1], [], [2, 3, 4], done, full=True) == ([], [])
    assert ranking.choose([0, -1], [], [2, 3, 4], done, full=True) == ([0], [(1, 2), (0, 3)])
    # without a limit; and a probe is for all, however many there are
    ranking.limit = float("inf")
    assert ranking.choose([0, 1], [], [2, 3, 4], done, full=True) == ([0], [(0, 2)])
    probing = parking.Ranking("lpt", np.full(6, 9.0), probe=4, limit=2.0)
    assert probing.choose([0, 5], [], [1, 2, 3], done, full=True)[0] == [0, 1]


@pytest.mark.parametrize(("slots", "gain"), [(16, 0.15), (8, 0.08), (4, 0.01)])
def test_turns_save_steps_without_predictions(slots, gain, monkeypatch):
    """On real lengths, and with no more parked than there are slots."""
    parked, choose = [], parking.Ranking.choose

    def watched(self, held, waits, *others, **options):
        parked.append(len(waits))
        return choose(self, held, waits, *others, **options)

    monkeypatch.setattr(parking.Ranking, "choose", watched)
    first, turns = (
        np.mean(
            [simulate(np.array(group) - 1, slots, policy).steps for group in MEASURED["groups"]]
        )
        for policy in ("fifo", "turns")
    )
    assert turns < (1 - gain) * first
    assert 0 < max(parked) <= slots


def test_orders():
    lengths, groups = [5.0, 9.0, 2.0, 7.0, 1.0], [0, 0, 1, 0, 1]
    wanted = {
        "fifo": [0, 1, 2, 3, 4], "turns": [0, 1, 2, 3, 4], "lpt": [1, 3, 0, 2, 4],
        "lrpt": [1, 3, 0, 2, 4], "sjf": [4, 2, 0, 3, 1], "group_sjf": [2, 4, 1, 3, 0],
    }  # fmt: skip
    for policy, expected in wanted.items():
        assert order(lengths, 2, policy, groups=groups) == expected
    # of the paper: groups of balanced total, each from the shortest up
    found = order([8.0, 1.0, 7.0, 2.0], 2, "paper")
    totals = [8 + 1, 7 + 2]
    assert [sum([8.0, 1.0, 7.0, 2.0][i] for i in part) for part in (found[:2], found[2:])] == totals
    assert all([8.0, 1.0, 7.0, 2.0][a] <= [8.0, 1.0, 7.0, 2.0][b]
               for a, b in (found[:2], found[2:]))  # fmt: skip
    # equal predictions stay as they come
    assert order([4.0] * 6, 2, "lpt") == order([4.0] * 6, 2, "sjf") == list(range(6))


def test_free_slots_cost_no_steps():
    """With ceil(sum / max) slots the bound is that of one slot per sample: on measured lengths."""
    assert len(MEASURED["groups"]) >= 8
    for group in MEASURED["groups"]:
        slots = free_slots(group)
        assert slots < len(group)
        assert preemptive_bound(group, slots) == max(group)
        assert simulate(group, slots, "lpt").steps <= 1.1 * max(group)
        assert preemptive_bound(group, slots - 1) > max(group) or slots == 1


def test_shortest_first_is_for_waiting_not_for_the_last():
    steps = {policy: [] for policy in ("lpt", "sjf", "fifo", "paper")}
    waits = {policy: [] for policy in steps}
    for group in MEASURED["groups"]:
        for policy, found in steps.items():
            result = simulate(group, len(group) // 4, policy)
            found.append(result.over_bound)
            waits[policy].append(result.ends.mean())
    mean = {policy: np.mean(found) for policy, found in steps.items()}
    assert mean["lpt"] < min(mean["fifo"], mean["sjf"], mean["paper"])
    assert np.mean(waits["sjf"]) < np.mean(waits["fifo"]) < np.mean(waits["lpt"])


def test_the_fptas_is_refused_where_it_explodes():
    lengths = np.arange(1.0, 33)
    # 8 parts: by bins and exchanges, at once
    found = partition.balanced(lengths, 8)
    assert partition.load(found, lengths) <= 1.02 * lengths.sum() / 8
    assert sorted(itertools.chain(*found)) == list(range(32))
    assert partition.balanced(lengths[:0], 3) in ([], [[], [], []])


def test_improve_never_worsens():
    random = np.random.default_rng(0)
    for _ in range(20):
        lengths = random.integers(1, 100, 17).astype(float)
        start = [list(part) for part in np.array_split(np.arange(17), 4)]
        found = partition.improve(start, lengths)
        assert partition.load(found, lengths) <= partition.load(start, lengths)
        assert sorted(itertools.chain(*found)) == list(range(17))


def test_bad_input():
    with pytest.raises(ValueError, match=r"policy: expected .*lpt"):
        order([1.0], 1, "longest")
    with pytest.raises(ValueError, match="slots"):
        schedule([1.0], 0)
    with pytest.raises(ValueError, match="predictions: expected numbers of at least 0"):
        order([1.0, float("nan")], 1)
    with pytest.raises(ValueError, match="predictions: expected 2 numbers"):
        simulate([1, 2], 1, "lpt", [3.0])
    with pytest.raises(ValueError, match="lengths"):
        simulate([-1], 1)
    assert simulate([], 3).steps == 0
    assert schedule([], 3).certificate == 0
