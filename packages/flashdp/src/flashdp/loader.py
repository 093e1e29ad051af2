"""A data loader whose batches are Poisson draws, in physical batches that fit the memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, MutableMapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from flashdp._checks import check_rate, check_real, check_whole
from flashdp.sampling import PoissonSampler, RowBatch, group_rows, physical_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from flashdp.accounting import Mechanism
    from flashdp.sampling import Indices

_OURS = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")
# One for each batch that any loader of the process yields.
_SERIALS = itertools.count(1)
_KEPT = ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn")


@dataclass(frozen=True)
class PhysicalBatch:
    """Which rows of a batch are whose.

    Attributes:
        mask: bool (units,), False for padding, which must contribute nothing.
        rows: int32 (units + 1,), rows before each unit; the last is the number of rows.
        first: Whether the batch opens a step.
        last: Whether it completes a step.
        serial: Tells it from every other batch, so that none is counted twice.
    """

    mask: Tensor
    rows: Tensor
    first: bool
    last: bool
    serial: int


class PoissonDataLoader:
    """Iterates over the physical batches of a run; made by `poisson_data_loader`.

    Iterating starts at the first step that is not complete and ends with the run. Break off and
    iterate again: the step that was under way is drawn anew.

    Attributes:
        current: The `PhysicalBatch` of the batch yielded last; None before the first.
        steps_done: Steps whose last batch has been yielded.
        num_steps: Steps of the run.
        sample_rate: Probability with which each unit enters a step.
        expected_batch_size: The public constant to divide by, if it was given.
        n_units: Units in the data set; private, unless it was said to be public.
        sampler: What draws the units.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: PoissonSampler,
        *,
        unit_rows: Sequence[Indices] | None,
        expected_batch_size: float | None,
        max_physical_batch_size: int | None,
        physical_batches_per_step: int | None,
        max_rows_per_unit: int | None,
        annotate: bool,
        options: dict[str, Any],
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.expected_batch_size = expected_batch_size
        self.max_physical_batch_size = max_physical_batch_size
        self.physical_batches_per_step = physical_batches_per_step
        self.max_rows_per_unit = max_rows_per_unit
        self.annotate = annotate
        self.current: PhysicalBatch | None = None
        self.steps_done = 0
        self._unit_rows = unit_rows
        self._options = options

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.sampler.steps

    @property
    def sample_rate(self) -> float:
        """Probability with which each unit enters a step."""
        return self.sampler.sample_rate

    @property
    def n_units(self) -> int:
        """Units in the data set."""
        return self.sampler.n_units

    @property
    def user_level(self) -> bool:
        """Whether units are users with several rows, rather than rows."""
        return self._unit_rows is not None

    def mechanism(self, noise_multiplier: float) -> Mechanism:
        """Return what the accountant has to count for a step of this loader."""
        return self.sampler.mechanism(noise_multiplier)

    def __len__(self) -> int:
        """Return the number of physical batches of the whole run, where it is not random."""
        if self.max_physical_batch_size is None:
            return self.num_steps
        if self.physical_batches_per_step is None:
            raise TypeError(
                "the number of physical batches is random: num_steps is the number of steps, and "
                "physical_batches_per_step makes the length fixed"
            )
        return self.num_steps * self.physical_batches_per_step

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches from the first incomplete step on."""
        if self.steps_done >= self.num_steps:
            raise RuntimeError(
                f"all {self.num_steps} steps of this loader are done; more of them cost more of "
                "the budget: make a loader with more steps"
            )
        return self._batches()

    def state_dict(self) -> dict[str, Any]:
        """Return the progress as JSON values; the random state of a secure run is not in it."""
        return {
            "steps_done": self.steps_done,
            "sample_rate": self.sample_rate,
            "seed": self.sampler.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps that another loader of the same run has done.

        Raises:
            ValueError: The state is of another rate or seed, or of more steps than this run has.
        """
        for name, ours in (("sample_rate", self.sample_rate), ("seed", self.sampler.seed)):
            if state.get(name) != ours:
                raise ValueError(
                    f"the state is of a run with {name} {state.get(name)!r}, this one has {ours!r}"
                )
        done = state.get("steps_done")
        if not isinstance(done, int) or not 0 <= done <= self.num_steps:
            raise ValueError(f"expected at most {self.num_steps} steps done, the state has {done}")
        self.steps_done = done

    def _batches(self) -> Iterator[Any]:
        # Workers ask for indices ahead of what is yielded; batches come back in the same order.
        ahead: deque[tuple[int, RowBatch]] = deque()
        planned: Any = _Planned(self._plan(self.steps_done, ahead))
        for batch in DataLoader(self.dataset, batch_sampler=planned, **self._options):
            step, plan = ahead.popleft()
            self.current = PhysicalBatch(
                torch.from_numpy(plan.mask),
                torch.from_numpy(plan.offsets.astype(np.int32)),
                plan.first,
                plan.last,
                next(_SERIALS),
            )
            if plan.last:
                self.steps_done = step + 1
            yield _annotated(batch, self.current) if self.annotate else batch

    def _plan(self, start: int, ahead: deque[tuple[int, RowBatch]]) -> Iterator[list[int]]:
        for step in range(start, self.num_steps):
            drawn = self.sampler.draw(step)
            if self._unit_rows is None:
                rows = [drawn[i : i + 1] for i in range(len(drawn))]
            else:
                limit = self.max_rows_per_unit
                rows = self.sampler.rows_of(drawn, self._unit_rows, limit, step)
            size, count = self.max_physical_batch_size, self.physical_batches_per_step
            for batch in physical_batches(rows, size, count=count):
                ahead.append((step, batch))
                yield batch.indices.tolist()


class _Planned:
    """What a DataLoader takes for a batch sampler."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches


def poisson_data_loader(
    dataset: Any,
    *,
    num_steps: int,
    sample_rate: float | None = None,
    expected_batch_size: float | None = None,
    public_n: int | Literal["dataset"] | None = None,
    max_physical_batch_size: int | None = None,
    physical_batches_per_step: int | None = None,
    max_batch_size: int | None = None,
    unit_ids: Sequence[Hashable] | str | None = None,
    max_rows_per_unit: int | None = None,
    secure_rng: bool = True,
    seed: int | None = None,
    annotate: bool = False,
    shard: int = 0,
    num_shards: int = 1,
    collate_fn: Callable | None = None,
    num_workers: int = 0,
    **loader_options: Any,
) -> PoissonDataLoader:
    """Make a loader that draws every unit independently into every step.

    Args:
        dataset: Rows by index, with a length.
        num_steps: Steps of the run.
        sample_rate: q, the probability with which each unit enters a step.
        expected_batch_size: B, the public constant to divide sums by; without ``sample_rate``,
            q is B / ``public_n``.
        public_n: A public number of units. ``"dataset"`` declares the data set's own to be
            public; it is never taken silently, because it says whether one unit is there.
        max_physical_batch_size: Rows computed at once; every batch is padded to it. ``None``
            computes a draw at once, whatever its size.
        physical_batches_per_step: Makes the number of batches the same for all steps. Draws that
            do not fit are cut, and accounted as truncated.
        max_batch_size: Cut draws of more units to a random subset, accounted as truncated; of
            several shards each its own.
        unit_ids: Whose row it is, for every row, or the name of a column that says so: the units
            are users then, and a drawn user brings all rows.
        max_rows_per_unit: A user brings at most so many, chosen at random in each step.
        secure_rng: Draw from the operating system's cryptographic generator.
        seed: For repeatable draws, with ``secure_rng=False``.
        annotate: Put ``dp_mask``, ``dp_rows``, ``dp_last`` and ``dp_batch``, a number of its own,
            into the batches, which have to be dicts.
        shard: Number of this process: draw from every ``num_shards``-th unit only, from this one
            on. All processes need the same data, in the same order, and other arguments.
        num_shards: Number of processes.
        collate_fn: As for ``torch.utils.data.DataLoader``.
        num_workers: As there.
        **loader_options: As there; what is said about batches and their order is refused.

    Raises:
        ValueError: A number is missing, out of range, or contradicts another.
        TypeError: The data set has no rows by index, or an option has the wrong type.
    """
    for name in _OURS:
        if name in loader_options:
            raise TypeError(f"{name}={loader_options[name]!r}: Poisson sampling decides about that")
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise TypeError(
            f"{type(dataset).__name__} gives no rows by index and no length, so that no row could "
            "be drawn with a known probability; use a map-style data set"
        )
    if len(dataset) == 0:
        raise ValueError("the data set is empty")
    check_whole("num_steps", num_steps)
    for name, value in (
        ("max_physical_batch_size", max_physical_batch_size),
        ("physical_batches_per_step", physical_batches_per_step),
        ("max_batch_size", max_batch_size),
        ("max_rows_per_unit", max_rows_per_unit),
    ):
        if value is not None:
            check_whole(name, value)
    if max_rows_per_unit is not None and unit_ids is None:
        raise ValueError(f"max_rows_per_unit={max_rows_per_unit} needs unit_ids")
    unit_rows = None if unit_ids is None else group_rows(_row_owners(dataset, unit_ids))
    n_units = len(dataset if unit_rows is None else unit_rows)
    known = _public(public_n, n_units)
    rate = _rate(sample_rate, expected_batch_size, known)
    _check_units_fit(unit_rows, max_rows_per_unit, max_physical_batch_size)
    cap = _cap(
        max_batch_size,
        physical_batches_per_step,
        max_physical_batch_size,
        1 if unit_rows is None else max_rows_per_unit,
    )
    if cap is not None:
        _check_cap(cap, known, n_units, rate, num_shards)
    sampler = PoissonSampler(
        n_units, rate, num_steps, secure=secure_rng, seed=seed, max_batch_size=cap, shard=shard,
        num_shards=num_shards,
    )  # fmt: skip
    return PoissonDataLoader(
        dataset,
        sampler,
        unit_rows=unit_rows,
        expected_batch_size=expected_batch_size,
        max_physical_batch_size=max_physical_batch_size,
        physical_batches_per_step=physical_batches_per_step,
        max_rows_per_unit=max_rows_per_unit,
        annotate=annotate,
        options={"collate_fn": collate_fn, "num_workers": num_workers, **loader_options},
    )


def from_data_loader(loader: Any, **options: Any) -> PoissonDataLoader:
    """Make a Poisson loader from a DataLoader's data set, collator and workers.

    Its ``batch_size`` becomes the physical batch size, if none is given.

    Args:
        loader: A ``torch.utils.data.DataLoader`` that takes rows in order or shuffled.
        **options: Of `poisson_data_loader`.

    Raises:
        ValueError: It chooses rows by a rule of its own, or leaves some out.
        TypeError: It is no DataLoader, or its data set has no rows by index.
    """
    if isinstance(loader, PoissonDataLoader):
        raise TypeError("the loader is a Poisson loader already")
    if not isinstance(loader, DataLoader):
        raise TypeError(f"expected a torch DataLoader, got {type(loader).__name__}")
    if not isinstance(loader.dataset, IterableDataset):
        _check_order(loader)
    # A worker's options are only taken beside workers.
    kept = {name: getattr(loader, name) for name in _KEPT}
    if loader.num_workers:
        kept["prefetch_factor"] = loader.prefetch_factor
        kept["multiprocessing_context"] = loader.multiprocessing_context
    options.setdefault("max_physical_batch_size", loader.batch_size)
    return poisson_data_loader(loader.dataset, **{**kept, **options})


def _check_order(loader: DataLoader) -> None:
    if loader.batch_size is None and loader.batch_sampler is None:
        raise ValueError("the loader has batch_size=None and makes no batches of rows")
    if loader.drop_last or getattr(loader.batch_sampler, "drop_last", False):
        raise ValueError(
            "the loader has drop_last=True, which makes what is used depend on the number of "
            "rows; leave it out"
        )
    if type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            f"the loader has a batch_sampler of its own ({type(loader.batch_sampler).__name__}), "
            "and every unit has to be drawn with the same probability: leave it out"
        )
    sampler: Any = loader.batch_sampler.sampler
    plain = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    if not plain:
        raise ValueError(
            f"the loader's {type(sampler).__name__} chooses rows by a rule of its own, and every "
            "unit has to be drawn with the same probability: leave it out"
        )


def _row_owners(dataset: Any, unit_ids: Any) -> list[Hashable]:
    if isinstance(unit_ids, str):
        unit_ids = _column(dataset, unit_ids)
    owners = unit_ids.tolist() if hasattr(unit_ids, "tolist") else list(unit_ids)
    if len(owners) != len(dataset):
        raise ValueError(f"expected an id for each row: {len(owners)} ids, {len(dataset)} rows")
    for row, owner in enumerate(owners):
        if isinstance(owner, torch.Tensor):
            # Tensors hash by identity: every row would be a user of its own.
            owners[row] = owner = owner.item()
        if not isinstance(owner, Hashable):
            raise TypeError(f"expected hashable ids of users, row {row} has {owner!r}")
        if owner is None or owner != owner:
            raise ValueError(f"row {row} has the id {owner!r}, which names no user")
    return owners


def _column(dataset: Any, name: str) -> Any:
    names = getattr(dataset, "column_names", None)
    if names is not None and name in names:
        return dataset[name]
    try:
        return [dataset[row][name] for row in range(len(dataset))]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the rows have no column {name!r} to take ids of users from") from error


def _public(public_n: Any, n_units: int) -> int | None:
    if public_n == "dataset":
        return n_units
    if public_n is not None:
        check_whole("public_n", public_n)
    return public_n


def _rate(rate: float | None, expected: float | None, public_n: int | None) -> float:
    if expected is not None:
        check_real("expected_batch_size", expected, "above 0", lambda v: v > 0)
    if rate is not None:
        check_rate("sample_rate", rate)
        return rate
    if expected is None:
        raise ValueError("expected a sample_rate, or an expected_batch_size with public_n")
    if public_n is None:
        raise ValueError(
            f"expected_batch_size={expected:g} needs public_n to make a sample rate of it, or give "
            "sample_rate; the number of units is never taken silently: public_n='dataset' declares "
            "it public"
        )
    if expected > public_n:
        raise ValueError(f"expected_batch_size={expected:g} is more than public_n={public_n}")
    return expected / public_n


def _check_units_fit(rows: Sequence[Indices] | None, limit: int | None, size: int | None) -> None:
    if rows is None or size is None:
        return
    if limit is not None and limit > size:
        raise ValueError(f"max_rows_per_unit={limit} is more than a physical batch of {size} rows")
    largest = max(map(len, rows))
    if limit is None and largest > size:
        raise ValueError(
            f"a user with {largest} rows does not fit a physical batch of {size} rows, and users "
            "are never split: raise max_physical_batch_size or set max_rows_per_unit"
        )


def _cap(
    given: int | None, count: int | None, size: int | None, per_unit: int | None
) -> int | None:
    if count is None:
        return given
    if size is None:
        raise ValueError(f"physical_batches_per_step={count} needs max_physical_batch_size")
    if per_unit is None:
        raise ValueError(
            f"physical_batches_per_step={count} needs max_rows_per_unit: without it no number of "
            "batches is sure to hold the users drawn"
        )
    # Packing in order leaves at most per_unit - 1 rows of a batch empty.
    fits = count * (size // per_unit)
    return fits if given is None else min(given, fits)


def _check_cap(cap: int, public_n: int | None, n_units: int, rate: float, num_shards: int) -> None:
    if public_n is None:
        raise ValueError(
            f"a cap of {cap} units per step is accounted with the number of units: give "
            "public_n='dataset' to declare it public"
        )
    if public_n != n_units:
        raise ValueError(
            f"a cap on draws is accounted with the true number of units: public_n={public_n}, the "
            f"data set has {n_units}"
        )
    expected = rate * n_units / num_shards
    if cap < expected:
        raise ValueError(
            f"a step has room for {cap} units and {expected:g} are expected: most draws "
            "would be cut; allow more or larger physical batches, or lower the sample rate"
        )


def _annotated(batch: Any, current: PhysicalBatch) -> Any:
    if not isinstance(batch, MutableMapping):
        raise TypeError(f"annotate=True needs batches that are dicts, got {type(batch).__name__}")
    added = {
        "dp_mask": current.mask,
        "dp_rows": current.rows,
        "dp_last": torch.tensor(current.last),
        "dp_batch": torch.tensor(current.serial),
    }
    if taken := sorted(added.keys() & batch.keys()):
        raise ValueError(f"the batch has {taken} already, which annotate=True would overwrite")
    batch.update(added)
    return batch
