"""Schedulers for the continuous batching of transformers that start answers by predicted length.

A request waits in the order of ``length + aging * arrival`` (``forelen_sjf``), ``-length + ...``
(``forelen_lpt``) or of the reciprocal Gittins index (``forelen_gittins``), which never changes
while it waits, so it is put into its place once. Requests that nothing is known of count as
average; if nothing is known of any, the order is first come, first served.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from shared_kernels._checks import check_choice, message

from forelen.schedule.priority import gittins_index

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from forelen.distribution import LengthDistribution

SCHEDULERS = ("forelen_sjf", "forelen_lpt", "forelen_gittins")
OBJECTIVES = {"makespan": "forelen_lpt", "latency": "forelen_sjf"}
"""Longest first keeps all places busy to the end; shortest first lets most wait little."""
#: Tokens that a second of waiting makes up for.
AGING = 20.0


class SchedulerError(RuntimeError):
    """The scheduler that runs is not the one that was asked for."""


class LengthTable:
    """Predicted lengths by the tokens of the prompt; safe to fill while a server runs.

    Args:
        aging: Tokens that a second of waiting makes up for; above 0, so that none waits for ever.
            Whoever fakes a short answer gains ``longest / aging`` seconds at most.
    """

    def __init__(self, *, aging: float = AGING) -> None:
        if not aging > 0:
            raise ValueError(message("aging", "a positive number", aging, f"{AGING:g}, say"))
        self.aging = aging
        self._lock = threading.Lock()
        self._mean: dict[tuple[int, ...], float] = {}
        self._effective: dict[tuple[int, ...], float] = {}
        self.live: list[str] = []

    def put(self, prompts: Sequence[Sequence[int]], found: LengthDistribution) -> None:
        """Enter the predictions of prompts, one row each."""
        if len(prompts) != len(found):
            remedy = "predict each prompt once"
            raise ValueError(message("found", f"{len(prompts)} rows", len(found), remedy))
        means = found.mean().tolist()
        pmf = found.tokens(found.end()).cpu().numpy()
        with self._lock:
            for ids, mean, row in zip(prompts, means, pmf, strict=True):
                key = tuple(map(int, ids))
                self._mean[key] = mean
                self._effective[key] = 1 / max(gittins_index(row), 1e-9)

    def length(self, ids: Sequence[int], *, effective: bool = False) -> float:
        """Return the mean length of a prompt's answer, or one over its Gittins index."""
        with self._lock:
            table = self._effective if effective else self._mean
            found = table.get(tuple(map(int, ids)))
            if found is None:
                found = float(np.mean(list(table.values()))) if table else 0.0
            return found


_table: LengthTable | None = None


def register_transformers_schedulers() -> None:
    """Add ``forelen_sjf``, ``forelen_lpt`` and ``forelen_gittins`` to those of transformers.

    ``ContinuousBatchingConfig(scheduler_type=...)`` names one; they need a table, see `scheduled`.
    """
    from transformers.generation.continuous_batching import scheduler as theirs

    if all(name in theirs.SCHEDULER_MAPPING for name in SCHEDULERS):
        return

    class LengthScheduler(theirs.FIFOScheduler):
        """First come, first served among those that are placed alike."""

        name = ""
        sign = 0.0
        effective = False

        def __init__(self, *args: Any, **options: Any) -> None:
            self._keys: dict[str, float] = {}
            self._table = _table
            super().__init__(*args, **options)
            if self._table is not None:
                self._table.live.append(self.name)

        def add_waiting_request(self, state: Any) -> None:
            """Put a request into its place."""
            super().add_waiting_request(state)
            if self._table is None:
                return
            ids = state.initial_tokens[: state._true_initial_tokens or None]
            length = self._table.length(ids, effective=self.effective)
            request = state.request_id
            self._keys[request] = self.sign * length + self._table.aging * state.created_time
            order = list(self.waiting_requests_order)
            order.pop()
            bisect.insort(order, request, key=lambda name: self._keys.get(name, 0.0))
            self.waiting_requests_order = deque(order)

        def finish_request(self, request_id: str, *args: Any, **options: Any) -> None:
            """Forget a request."""
            self._keys.pop(request_id, None)
            super().finish_request(request_id, *args, **options)

    mapping: dict[str, Any] = theirs.SCHEDULER_MAPPING
    for name, sign, effective in (
        ("forelen_sjf", 1.0, False),
        ("forelen_lpt", -1.0, False),
        ("forelen_gittins", 1.0, True),
    ):
        made = {"name": name, "sign": sign, "effective": effective}
        mapping[name] = type(name, (LengthScheduler,), made)


@contextmanager
def scheduled(table: LengthTable) -> Generator[LengthTable]:
    """Within this, schedulers that are made go by the table.

    Raises:
        SchedulerError: Another table is in use.
    """
    global _table
    if _table is not None:
        raise SchedulerError("another table is in use; leave its context first")
    register_transformers_schedulers()
    _table = table
    try:
        yield table
    finally:
        _table = None


def check_live(manager: Any, name: str) -> None:
    """Raise unless a running manager uses the scheduler of this name.

    transformers runs an unknown scheduler as first come, first served, and only warns.

    Raises:
        SchedulerError: It uses another.
    """
    processor = getattr(manager, "batch_processor", None)
    live = getattr(getattr(processor, "scheduler", None), "name", None)
    if live != name:
        found = type(getattr(processor, "scheduler", None)).__name__
        raise SchedulerError(
            f"scheduler: expected {name} to run, found {found}; call "
            "register_transformers_schedulers() before the manager starts"
        )


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    found: LengthDistribution,
    *,
    objective: str = "makespan",
    aging: float = AGING,
    continuous_batching_config: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Answer prompts with the model's ``generate_batch``, started in the order of an objective.

    Args:
        model: A transformers model.
        prompts: Tokens of each prompt.
        found: The predicted length of each answer.
        objective: ``makespan``: longest first; ``latency``: shortest first.
        aging: Tokens that a second of waiting makes up for.
        continuous_batching_config: Of transformers; its scheduler is set.
        **options: Of ``generate_batch``.

    Returns:
        What ``generate_batch`` returns.

    Raises:
        SchedulerError: transformers ran another scheduler.
    """
    from transformers import ContinuousBatchingConfig

    check_choice("objective", objective, tuple(OBJECTIVES))
    config = continuous_batching_config or ContinuousBatchingConfig()
    config.scheduler_type = OBJECTIVES[objective]
    table = LengthTable(aging=aging)
    table.put(prompts, found)
    with scheduled(table):
        output = model.generate_batch(
            inputs=[list(ids) for ids in prompts], continuous_batching_config=config, **options
        )
    if table.live != [config.scheduler_type]:
        raise SchedulerError(
            f"scheduler: expected {config.scheduler_type} to run, found {table.live or 'another'}"
        )
    return output
