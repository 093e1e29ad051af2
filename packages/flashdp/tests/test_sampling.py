"""Poisson draws, their subsets, and how they are packed into physical batches."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from flashdp.accounting import Accountant
from flashdp.sampling import PoissonSampler, group_rows, physical_batches
from hypothesis import given, settings
from hypothesis import strategies as st

SIGMAS = 4.0


def seeded(n=1000, rate=0.1, steps=400, seed=7, **options):
    return PoissonSampler(n, rate, steps, secure=False, seed=seed, **options)


def within(count, trials, probability):
    """Whether a binomial count is within four standard deviations of its mean."""
    spread = math.sqrt(trials * probability * (1 - probability))
    return abs(count - trials * probability) <= SIGMAS * spread


# -- draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [True, False])
def test_units_enter_with_the_sample_rate(secure):
    n, rate, steps = 1000, 0.1, 400
    options = {"secure": True} if secure else {"secure": False, "seed": 7}
    sampler = PoissonSampler(n, rate, steps, **options)
    present = np.zeros((steps, n), bool)
    for step in range(steps):
        drawn = sampler.draw(step)
        assert (np.diff(drawn) > 0).all()
        present[step, drawn] = True
    assert within(present.sum(), steps * n, rate)
    # Sizes vary as a binomial's: a fixed-size or shuffled sampler has none of this variance.
    spread = n * rate * (1 - rate)
    assert abs(present.sum(1).var() / spread - 1) < SIGMAS * math.sqrt(2 / steps)
    # So do the times a unit is drawn, and pairs of units or steps are drawn independently.
    assert abs(present.sum(0).var() / (steps * rate * (1 - rate)) - 1) < SIGMAS * math.sqrt(2 / n)
    assert within((present[:, 0::2] & present[:, 1::2]).sum(), steps * n // 2, rate**2)
    assert within((present[0::2] & present[1::2]).sum(), steps * n // 2, rate**2)


def test_sample_rate_one_takes_everyone():
    assert np.array_equal(seeded(50, 1.0).draw(3), np.arange(50))


def test_a_tiny_sample_rate_draws_nobody():
    assert seeded(10, 1e-12).draw(0).size == 0


def test_seeded_draws_are_a_function_of_seed_and_step():
    first, again = seeded(), seeded()
    forward = [first.draw(t) for t in range(5)]
    backward = [again.draw(t) for t in reversed(range(5))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not np.array_equal(forward[0], forward[1])
    assert not np.array_equal(forward[0], seeded(seed=8).draw(0))


def test_every_64_bit_seed_works():
    draws = [seeded(seed=seed).draw(0) for seed in (0, 2**63, 2**64 - 1)]
    assert not np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[1], draws[2])


def test_secure_draws_are_never_the_same():
    sampler = PoissonSampler(1000, 0.5, 2)
    assert not np.array_equal(sampler.draw(0), sampler.draw(0))


def test_iteration_gives_one_draw_per_step():
    sampler = seeded(steps=3)
    assert len(sampler) == len(list(sampler)) == 3
    assert all(np.array_equal(a, sampler.draw(t)) for t, a in enumerate(sampler))


# -- truncation ------------------------------------------------------------------------------------


def test_a_capped_draw_is_a_uniform_subset():
    n, cap, steps = 40, 10, 3000
    free, capped = seeded(n, 0.5, steps), seeded(n, 0.5, steps, max_batch_size=cap)
    counts = np.zeros(n)
    cut = 0
    for step in range(steps):
        whole, part = free.draw(step), capped.draw(step)
        assert set(part) <= set(whole)
        assert part.size == min(whole.size, cap)
        if whole.size > cap:
            cut += 1
            counts[part] += 1
    assert cut > 0.9 * steps
    assert all(within(count, cut, cap / n) for count in counts)


def test_the_mechanism_says_how_it_was_drawn():
    plain = seeded(1000, 0.1).mechanism(1.5)
    assert (plain.noise_multiplier, plain.sample_rate, plain.sampling) == (1.5, 0.1, "poisson")
    capped = seeded(1000, 0.1, max_batch_size=128).mechanism(1.5)
    assert capped.sampling == "truncated"
    assert (capped.dataset_size, capped.truncated_batch_size) == (1000, 128)


# -- rows of users ---------------------------------------------------------------------------------


def test_shards_draw_from_their_own_units_and_together_from_all():
    drawn = [
        PoissonSampler(11, 0.6, 40, secure=False, seed=3, shard=s, num_shards=3) for s in range(3)
    ]
    seen = [np.concatenate(list(sampler)) for sampler in drawn]
    for shard, units in enumerate(seen):
        assert set(units) == set(range(shard, 11, 3))
    # Streams of their own: equal places of two shards are not drawn at equal steps.
    places = [[tuple((units - s) // 3) for units in drawn[s]] for s in range(2)]
    assert places[0] != places[1]
    rate = len(np.concatenate(seen)) / (11 * 40)
    assert abs(rate - 0.6) < 4 * (0.6 * 0.4 / 440) ** 0.5


def test_a_capped_shard_is_accounted_as_the_largest():
    """A larger one is cut more often, which costs more."""
    made = [PoissonSampler(11, 0.3, 5, max_batch_size=3, shard=s, num_shards=2) for s in range(2)]
    found = [sampler.mechanism(1.0) for sampler in made]
    assert found[0] == found[1]
    assert found[0].dataset_size == 6
    epsilons = []
    for size in (5, 6):
        accountant = Accountant("pld")
        accountant.step(replace(found[0], dataset_size=size))
        epsilons.append(accountant.epsilon(1e-5))
    assert epsilons[0] < epsilons[1]
    free = PoissonSampler(11, 0.3, 5, shard=1, num_shards=2).mechanism(1.0)
    assert free == PoissonSampler(11, 0.3, 5).mechanism(1.0)


@pytest.mark.parametrize(("shard", "count"), [(2, 2), (-1, 2), (0, 12)])
def test_shards_that_do_not_exist_are_refused(shard, count):
    with pytest.raises(ValueError, match="shard"):
        PoissonSampler(11, 0.3, 5, shard=shard, num_shards=count)


def test_rows_are_grouped_by_first_appearance():
    groups = group_rows(["b", "a", "b", ("c", 1), "a", "b"])
    assert [list(g) for g in groups] == [[0, 2, 5], [1, 4], [3]]


def test_too_many_rows_of_a_user_are_cut_to_a_uniform_subset():
    sampler = seeded(1, 1.0, 2000)
    rows = [np.arange(10)]
    counts = np.zeros(10)
    for step in range(2000):
        (kept,) = sampler.rows_of(sampler.draw(step), rows, 3, step)
        assert len(set(kept)) == 3
        counts[kept] += 1
    assert all(within(count, 2000, 0.3) for count in counts)
    (same,) = sampler.rows_of(np.array([0]), rows, 10, 0)
    assert list(same) == list(range(10))


# -- packing ---------------------------------------------------------------------------------------


def check_packing(batches, rows, size, count):
    real = [
        list(batch.indices[a:b])
        for batch in batches
        for a, b, keep in zip(batch.offsets[:-1], batch.offsets[1:], batch.mask, strict=True)
        if keep
    ]
    assert real == [list(r) for r in rows]
    for number, batch in enumerate(batches):
        assert len(batch.indices) == batch.offsets[-1] == size
        assert batch.offsets[0] == 0
        assert (np.diff(batch.offsets) >= 1).all()
        assert len(batch.mask) == len(batch.offsets) - 1
        assert batch.first == (number == 0)
        assert batch.last == (number == len(batches) - 1)
    assert len(batches) >= 1
    if count:
        assert len(batches) == count


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 5), max_size=40), st.integers(5, 12), st.booleans())
def test_every_drawn_row_is_computed_once(sizes, size, fixed):
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    rows = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    count = max(1, -(-len(rows) // (size // 5))) if fixed else None
    check_packing(physical_batches(rows, size, count=count), rows, size, count)


def test_an_empty_draw_is_one_masked_batch():
    (batch,) = physical_batches([], 4, filler=9)
    assert list(batch.indices) == [9, 9, 9, 9]
    assert not batch.mask.any()
    assert (batch.first, batch.last) == (True, True)
    (whole,) = physical_batches([], None)
    assert len(whole.indices) == 1
    assert not whole.mask.any()


def test_without_a_size_a_draw_is_one_batch():
    (batch,) = physical_batches([np.array([3]), np.array([5, 6])], None)
    assert list(batch.indices) == [3, 5, 6]
    assert list(batch.offsets) == [0, 1, 3]
    assert batch.mask.all()


def test_padding_repeats_a_row_of_the_batch():
    # A row from elsewhere could be longer, and lengthen every padded sequence of the batch.
    (batch,) = physical_batches([np.array([3]), np.array([7])], 4, filler=0)
    assert set(batch.indices) == {3, 7}


def test_a_unit_is_never_split():
    with pytest.raises(ValueError, match=r"unit .* 5 rows.* 4 rows.*max_rows_per_unit"):
        physical_batches([np.arange(5)], 4)


def test_more_than_the_fixed_number_of_batches_is_an_error():
    with pytest.raises(ValueError, match=r"9 unit.* 2 .*4 rows.*max_batch_size"):
        physical_batches([np.array([i]) for i in range(9)], 4, count=2)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        ((0, 0.1, 1), {}, ValueError, "n_units: .*0"),
        ((10.0, 0.1, 1), {}, TypeError, "n_units"),
        ((10, 0.0, 1), {}, ValueError, "sample_rate: .*0.0"),
        ((10, 1.01, 1), {}, ValueError, "sample_rate: .*1.01"),
        ((10, math.nan, 1), {}, ValueError, "sample_rate"),
        ((10, 0.1, 0), {}, ValueError, "steps"),
        ((10, 0.1, 1), {"seed": 3}, ValueError, "seed: .*secure=False"),
        ((10, 0.1, 1), {"secure": False}, ValueError, "seed"),
        ((10, 0.1, 1), {"secure": False, "seed": -1}, ValueError, "seed"),
        ((10, 0.1, 1), {"max_batch_size": 0}, ValueError, "max_batch_size"),
    ],
)
def test_sampler_refuses(args, options, error, words):
    with pytest.raises(error, match=words):
        PoissonSampler(*args, **options)


def test_steps_outside_the_run_are_refused():
    for step in (-1, 400):
        with pytest.raises(IndexError, match=str(step)):
            seeded().draw(step)


@pytest.mark.parametrize("size", [0, -1])
def test_physical_batches_refuses(size):
    with pytest.raises(ValueError, match="size"):
        physical_batches([], size)
    with pytest.raises(ValueError, match="count"):
        physical_batches([], 4, count=size)
