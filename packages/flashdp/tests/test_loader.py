"""The Poisson loader: what it yields, in which order, for whom, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from flashdp.loader import PoissonDataLoader, from_data_loader, poisson_data_loader
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

N = 60


class Rows(Dataset):
    """Row i is i; users own rows by turns of unequal length."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return {"x": torch.tensor(index)}


USERS = [f"user {int(np.sqrt(i))}" for i in range(N)]


def make(dataset=None, **changes):
    options = {
        "num_steps": 6,
        "sample_rate": 0.2,
        "max_physical_batch_size": 8,
        "secure_rng": False,
        "seed": 3,
    }
    return poisson_data_loader(Rows() if dataset is None else dataset, **{**options, **changes})


def collect(loader):
    """The rows and flags of every physical batch, and the units of every step."""
    steps, units = [], []
    for batch in loader:
        now = loader.current
        x = batch["x"].tolist()
        assert now.mask.dtype == torch.bool
        assert now.rows.dtype == torch.int32
        assert len(now.mask) == len(now.rows) - 1
        assert now.rows[-1] == len(x)
        if now.first:
            units = []
        bounds = now.rows.tolist()
        for keep, a, b in zip(now.mask.tolist(), bounds[:-1], bounds[1:], strict=True):
            if keep:
                units.append(x[a:b])
        if now.last:
            steps.append(units)
    return steps


# -- what is yielded -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_every_drawn_row_comes_once_with_its_mask(workers):
    loader = make(num_workers=workers)
    steps = collect(loader)
    expected = [[[u] for u in loader.sampler.draw(t).tolist()] for t in range(6)]
    assert steps == expected
    assert loader.steps_done == 6
    assert any(len(step) > 8 for step in steps)


def test_batches_have_a_fixed_size():
    loader = make()
    assert {len(batch["x"]) for batch in loader} == {8}


def test_a_whole_draw_is_one_batch_without_a_physical_size():
    loader = make(max_physical_batch_size=None)
    assert len(loader) == 6
    assert len(list(loader)) == 6


def test_empty_draws_are_yielded_masked():
    loader = make(sample_rate=1e-9)
    masks = [loader.current.mask for _ in loader]
    assert len(masks) == 6
    assert not torch.cat(masks).any()
    assert collect(make(sample_rate=1e-9)) == [[]] * 6


def test_a_constant_number_of_physical_batches():
    loader = make(physical_batches_per_step=2, public_n=N)
    assert len(loader) == 12
    flags = [(loader.current.first, loader.current.last) for _ in loader]
    assert flags == [(True, False), (False, True)] * 6
    mechanism = loader.mechanism(1.0)
    assert (mechanism.sampling, mechanism.truncated_batch_size) == ("truncated", 16)
    assert mechanism.dataset_size == N


def test_processes_share_the_rows_and_what_is_expected_of_a_step():
    loaders = [
        poisson_data_loader(
            list(range(40)), num_steps=3, expected_batch_size=20, public_n="dataset",
            max_physical_batch_size=6, physical_batches_per_step=3, shard=shard, num_shards=2,
        )
        for shard in range(2)
    ]  # fmt: skip
    for shard, loader in enumerate(loaders):
        assert (loader.n_units, loader.sample_rate, len(loader)) == (40, 0.5, 9)
        assert loader.mechanism(1.0).truncated_batch_size == 18
        for batch in loader:
            drawn = batch[loader.current.mask].tolist()
            assert all(row % 2 == shard for row in drawn)
    with pytest.raises(ValueError, match="room for 6 units and 10 are expected"):
        poisson_data_loader(
            list(range(40)), num_steps=3, expected_batch_size=20, public_n="dataset",
            max_physical_batch_size=6, physical_batches_per_step=1, shard=0, num_shards=2,
        )  # fmt: skip


def test_the_length_of_a_random_number_of_batches_is_not_made_up():
    with pytest.raises(TypeError, match=r"random.*num_steps.*physical_batches_per_step"):
        len(make())


def test_current_belongs_to_the_batch_in_hand_whatever_workers_have_prefetched():
    loader = make(num_workers=2, prefetch_factor=4)
    assert loader.current is None
    seen = 0
    for batch in loader:
        real = batch["x"][loader.current.mask].tolist()
        drawn = set(loader.sampler.draw(loader.steps_done - loader.current.last).tolist())
        assert set(real) <= drawn
        seen += 1
    assert seen >= 6


# -- users -----------------------------------------------------------------------------------------


def rows_by_user():
    groups = {}
    for row, user in enumerate(USERS):
        groups.setdefault(user, []).append(row)
    return list(groups.values())


def test_a_drawn_user_brings_all_rows_and_is_never_split():
    loader = make(unit_ids=USERS, max_physical_batch_size=16, sample_rate=0.5)
    groups = rows_by_user()
    assert loader.n_units == len(groups)
    steps = collect(loader)
    for t, step in enumerate(steps):
        assert step == [groups[u] for u in loader.sampler.draw(t)]


def test_rows_per_user_can_be_capped():
    loader = make(
        unit_ids=USERS,
        max_rows_per_unit=3,
        sample_rate=0.5,
        physical_batches_per_step=4,
        public_n="dataset",
    )
    # 8 rows hold two users of three rows each.
    assert loader.mechanism(1.0).truncated_batch_size == 8
    groups = rows_by_user()
    for step in collect(loader):
        for unit in step:
            owner = next(g for g in groups if unit[0] in g)
            assert set(unit) <= set(owner)
            assert len(unit) == min(3, len(owner))


def test_users_may_be_tensors_or_arrays():
    ids = [int(np.sqrt(i)) for i in range(N)]
    for given in (ids, np.array(ids), torch.tensor(ids), [torch.tensor(i) for i in ids]):
        assert make(unit_ids=given, max_physical_batch_size=16).n_units == len(set(ids))


def test_users_from_a_column():
    class Table(Rows):
        def __getitem__(self, index):
            return {"x": index, "user": USERS[index]}

    assert make(Table(), unit_ids="user", max_physical_batch_size=16).n_units == len(set(USERS))
    with pytest.raises(ValueError, match="'owner'"):
        make(Table(), unit_ids="owner")


def test_a_user_too_large_for_the_memory_is_named_with_numbers():
    with pytest.raises(ValueError, match=r"13 rows.*8 rows.*max_rows_per_unit"):
        make(unit_ids=USERS)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (USERS[:-1], "59.*60"),
        ([*USERS[:-1], None], "row 59.*None"),
        ([*range(N - 1), float("nan")], "row 59.*nan"),
        ([[i] for i in range(N)], r"hashable.*\[0\]"),
    ],
)
def test_user_ids_that_would_void_the_guarantee_are_refused(ids, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make(unit_ids=ids, max_physical_batch_size=16)


# -- annotation ------------------------------------------------------------------------------------


def test_annotated_batches_carry_mask_rows_and_last():
    loader = make(annotate=True)
    for batch in loader:
        now = loader.current
        assert torch.equal(batch["dp_mask"], now.mask)
        assert torch.equal(batch["dp_rows"], now.rows)
        assert batch["dp_last"].dtype == torch.bool
        assert bool(batch["dp_last"]) == now.last
        assert int(batch["dp_batch"]) == now.serial


def test_what_cannot_be_annotated_is_refused():
    with pytest.raises(TypeError, match=r"annotate.*dict.*list"):
        next(iter(make(TensorDataset(torch.arange(N)), annotate=True)))
    with pytest.raises(ValueError, match="dp_mask"):
        clash = [{"x": i, "dp_mask": 1} for i in range(N)]
        next(iter(make(clash, annotate=True)))


def test_a_tokenizers_collator_and_workers():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="b"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")
    rows = [dict(tokenizer("a " * (1 + i % 5))) for i in range(N)]
    loader = make(rows, collate_fn=DataCollatorWithPadding(tokenizer), num_workers=2, annotate=True)
    for batch in loader:
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert len(batch["input_ids"]) == len(batch["dp_mask"]) == 8
        # Padding rows are copies, so that they lengthen no sequence.
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]


# -- resuming --------------------------------------------------------------------------------------


def test_a_run_continues_at_the_step_after_the_last_complete_one():
    whole = collect(make())
    loader = make()
    done = 0
    for _ in loader:
        done += loader.current.last
        if done == 2:
            break
    assert loader.steps_done == 2
    state = json.loads(json.dumps(loader.state_dict()))
    again = make()
    again.load_state_dict(state)
    assert collect(again) == whole[2:]


def test_a_step_broken_off_is_drawn_anew():
    loader = make(max_physical_batch_size=2)
    next(iter(loader))
    assert loader.steps_done == 0
    assert len(collect(loader)) == 6


def test_a_loader_that_is_done_says_so():
    loader = make()
    collect(loader)
    with pytest.raises(RuntimeError, match=r"all 6 steps"):
        iter(loader)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample_rate": 0.3}, "sample_rate"),
        ({"seed": 4}, "seed"),
        ({"num_steps": 2}, "num_steps|steps"),
    ],
)
def test_state_of_another_run_is_refused(change, words):
    loader = make()
    collect(loader)
    with pytest.raises(ValueError, match=words):
        make(**change).load_state_dict(loader.state_dict())


# -- an existing loader ----------------------------------------------------------------------------


def double(rows):
    return {"x": torch.stack([row["x"] for row in rows]), "twice": 2}


def test_an_existing_loader_gives_its_parts():
    plain = DataLoader(Rows(), batch_size=5, shuffle=True, collate_fn=double, num_workers=1)
    loader = from_data_loader(plain, num_steps=3, sample_rate=0.2)
    assert isinstance(loader, PoissonDataLoader)
    assert loader.max_physical_batch_size == 5
    batch = next(iter(loader))
    assert batch["twice"] == 2
    assert len(batch["x"]) == 5


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Odd(torch.utils.data.Sampler):
    def __iter__(self):
        return iter([1, 3])

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("loader", "error", "words"),
    [
        (lambda: DataLoader(Rows(), 4, drop_last=True), ValueError, "drop_last"),
        (
            lambda: DataLoader(Rows(), 4, sampler=WeightedRandomSampler([1.0] * N, N)),
            ValueError,
            "WeightedRandomSampler.*same probability",
        ),
        (lambda: DataLoader(Rows(), 4, sampler=Odd()), ValueError, "Odd.*same probability"),
        (
            lambda: DataLoader(
                Rows(), 4, sampler=torch.utils.data.RandomSampler(Rows(), replacement=True)
            ),
            ValueError,
            "RandomSampler",
        ),
        (
            lambda: DataLoader(
                Rows(), batch_sampler=torch.utils.data.BatchSampler(Odd(), 2, False)
            ),
            ValueError,
            "Odd",
        ),
        (lambda: DataLoader(Rows(), batch_sampler=[[0, 1]]), ValueError, "batch_sampler.*list"),
        (lambda: DataLoader(Rows(), batch_size=None), ValueError, "batch_size=None"),
        (lambda: DataLoader(Stream()), TypeError, "Stream.*index"),
        (lambda: [1, 2], TypeError, "list"),
        (lambda: make(), TypeError, "already"),
    ],
)
def test_loaders_that_promise_something_else_are_refused(loader, error, words):
    with pytest.raises(error, match=words):
        from_data_loader(loader(), num_steps=3, sample_rate=0.2)


def test_length_grouped_sampling_is_refused():
    from transformers.trainer_pt_utils import LengthGroupedSampler

    sampler = LengthGroupedSampler(4, lengths=list(range(N)))
    with pytest.raises(ValueError, match="LengthGroupedSampler"):
        from_data_loader(DataLoader(Rows(), 4, sampler=sampler), num_steps=3, sample_rate=0.2)


# -- the rate and the public constants -------------------------------------------------------------


def test_the_rate_follows_from_public_numbers_only():
    loader = make(sample_rate=None, expected_batch_size=12, public_n=100)
    assert loader.sample_rate == 0.12
    assert loader.expected_batch_size == 12
    assert make(sample_rate=None, expected_batch_size=12, public_n="dataset").sample_rate == 0.2
    assert make().expected_batch_size is None
    assert make(expected_batch_size=10).expected_batch_size == 10


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sample_rate": None}, ValueError, "sample_rate.*expected_batch_size"),
        (
            {"sample_rate": None, "expected_batch_size": 12},
            ValueError,
            r"public_n.*never taken silently",
        ),
        (
            {"sample_rate": None, "expected_batch_size": 61, "public_n": N},
            ValueError,
            "61.*60",
        ),
        ({"expected_batch_size": 0}, ValueError, "expected_batch_size"),
        ({"public_n": "all"}, TypeError, "public_n.*'all'"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"max_batch_size": 20}, ValueError, "public_n"),
        ({"max_batch_size": 20, "public_n": 61}, ValueError, "61.*60"),
        ({"physical_batches_per_step": 1, "public_n": N}, ValueError, r"8 .*12"),
        (
            {"physical_batches_per_step": 2, "max_physical_batch_size": None},
            ValueError,
            "max_physical_batch_size",
        ),
        (
            {"unit_ids": USERS, "physical_batches_per_step": 2, "public_n": "dataset"},
            ValueError,
            "max_rows_per_unit",
        ),
        ({"max_rows_per_unit": 2}, ValueError, "unit_ids"),
        (
            {"unit_ids": USERS, "max_rows_per_unit": 9},
            ValueError,
            "max_rows_per_unit.*9.*8",
        ),
        ({"shuffle": True}, TypeError, "shuffle.*Poisson"),
        ({"drop_last": True}, TypeError, "drop_last.*Poisson"),
        ({"seed": None}, ValueError, "seed"),
        ({"secure_rng": True}, ValueError, "seed"),
        ({"dataset": Stream()}, TypeError, "Stream.*index"),
        ({"dataset": Subset(Rows(), [])}, ValueError, "empty"),
    ],
)
def test_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        make(**changes)
