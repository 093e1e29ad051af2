"""Schedulers for the continuous batching of transformers that start answers by predicted length.

A request waits in the order of ``length + aging * arrival`` (``forelen_sjf``), ``-length + ...``
(``forelen_lpt``), of the reciprocal Gittins index (``forelen_gittins``) or of a plan made before
(``forelen_plan``), which never changes while it waits, so it is put into its place once. Requests
that nothing is known of count as average; if nothing is known of any, the order is first come,
first served.

``forelen_turns`` starts the shortest first, too, and pauses an answer that has had its turn while
one waits that had a turn less: no long answer starts last and keeps all waiting, whatever was
predicted. What a paused answer has in the cache is dropped, and read again when its turn comes.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from shared_kernels._checks import check_choice, check_range, message

from forelen.schedule.order import plan_order
from forelen.schedule.priority import gittins_index
from forelen.schedule.simulator import TURN

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from forelen.distribution import LengthDistribution

SCHEDULERS = ("forelen_sjf", "forelen_lpt", "forelen_gittins", "forelen_plan", "forelen_turns")
OBJECTIVES = {"makespan": "forelen_turns", "latency": "forelen_sjf"}
"""Turns let the last answer end soon; shortest first lets most wait little."""
#: Requests at a time that transformers takes if nothing is said.
_SLOTS = 1024
#: Tokens that a second of waiting makes up for.
AGING = 20.0


class SchedulerError(RuntimeError):
    """The scheduler that runs is not the one that was asked for."""


class LengthTable:
    """Predicted lengths by the tokens of the prompt; safe to fill while a server runs.

    Args:
        aging: Tokens that a second of waiting makes up for; above 0, so that none waits for ever.
            Whoever fakes a short answer gains ``longest / aging`` seconds at most.
        turn: Tokens of a turn, for ``forelen_turns``.

    Attributes:
        longest: The longest predicted length so far, at least a turn.
        live: Names of the schedulers that were made with the table.
        pauses: How often an answer was paused.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(self, *, aging: float = AGING, turn: int = TURN) -> None:
        if not aging > 0:
            raise ValueError(message("aging", "a positive number", aging, f"{AGING:g}, say"))
        check_range("turn", turn, 1, 1 << 31, "tokens until an answer makes way")
        self.aging, self.turn, self.pauses = aging, turn, 0
        self.longest = float(turn)
        self._lock = threading.Lock()
        self._mean: dict[tuple[int, ...], float] = {}
        self._effective: dict[tuple[int, ...], float] = {}
        self._planned: dict[tuple[int, ...], float] = {}
        self.live: list[str] = []

    def put(
        self,
        prompts: Sequence[Sequence[int]],
        found: LengthDistribution,
        order: Sequence[int] | None = None,
    ) -> None:
        """Enter the predictions of prompts, one row each.

        Args:
            prompts: Tokens of each prompt.
            found: The predicted length of each answer.
            order: As `plan_order` returns it, for ``forelen_plan``.

        Raises:
            ValueError: Not a prediction for each prompt, or an order that is none.
        """
        if len(prompts) != len(found):
            remedy = "predict each prompt once"
            raise ValueError(message("found", f"{len(prompts)} rows", len(found), remedy))
        if order is not None and sorted(order) != list(range(len(prompts))):
            remedy = "take that of plan_order(found, slots)"
            raise ValueError(message("order", f"rows 0 to {len(prompts) - 1}", order, remedy))
        means = found.mean().tolist()
        pmf = found.tokens(found.end()).cpu().numpy()
        with self._lock:
            self.longest = max([self.longest, *means])
            for ids, mean, row in zip(prompts, means, pmf, strict=True):
                key = tuple(map(int, ids))
                self._mean[key] = mean
                self._effective[key] = 1 / max(gittins_index(row), 1e-9)
            # places in tokens, so that waiting counts as it does among lengths
            step = float(np.mean(means)) if means else 0.0
            for place, row in enumerate(() if order is None else order):
                self._planned[tuple(map(int, prompts[row]))] = place * step

    def length(self, ids: Sequence[int], kind: str = "mean") -> float:
        """Return what a request is placed by, in tokens.

        Args:
            ids: Tokens of the prompt.
            kind: ``mean``, the predicted length; ``effective``, one over its Gittins index; or
                ``planned``, its place in the plan times a mean length.
        """
        with self._lock:
            tables = {
                "mean": self._mean, "effective": self._effective, "planned": self._planned,
            }  # fmt: skip
            table = tables[kind]
            found = table.get(tuple(map(int, ids)))
            if found is None:
                found = float(np.mean(list(table.values()))) if table else 0.0
            return found


_table: LengthTable | None = None


def register_transformers_schedulers() -> None:
    """Add ``forelen_sjf``, ``_lpt``, ``_gittins``, ``_plan`` and ``_turns`` to transformers'.

    ``ContinuousBatchingConfig(scheduler_type=...)`` names one; they need a table, see `scheduled`.
    """
    from transformers.generation.continuous_batching import requests
    from transformers.generation.continuous_batching import scheduler as theirs

    if all(name in theirs.SCHEDULER_MAPPING for name in SCHEDULERS):
        return

    class LengthScheduler(theirs.FIFOScheduler):
        """First come, first served among those that are placed alike."""

        name = ""
        sign = 0.0
        kind = "mean"
        turns = False

        def __init__(self, *args: Any, **options: Any) -> None:
            self._keys: dict[str, float] = {}
            self._stuck = False
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
            length = self._table.length(ids, self.kind)
            request = state.request_id
            turns = _made(state) // self._table.turn if self.turns else 0
            self._keys[request] = (
                self.sign * length
                + turns * self._table.longest
                + self._table.aging * state.created_time
            )
            order = list(self.waiting_requests_order)
            order.pop()
            bisect.insort(order, request, key=lambda name: self._keys.get(name, 0.0))
            self.waiting_requests_order = deque(order)

        def finish_request(self, request_id: str, *args: Any, **options: Any) -> None:
            """Forget a request."""
            self._keys.pop(request_id, None)
            super().finish_request(request_id, *args, **options)

        def schedule_batch(self, token_budget: int, *args: Any, **options: Any) -> Any:
            """Pause whose turn is over, then fill the batch."""
            if self.turns and self._table is not None:
                self._table.pauses += self._pause(token_budget, self._table.turn)
            before = len(self.waiting_requests)
            found = super().schedule_batch(token_budget, *args, **options)
            # not for want of tokens, so for want of places or of cache
            self._stuck = before == len(self.waiting_requests) > 0 and found[2] < token_budget
            return found

        def _pause(self, budget: int, turn: int) -> int:
            """Make way for the first that wait, as far as their tokens fit into the batch.

            Returns:
                How many were paused.
            """
            full = self._stuck or len(self.active_requests) >= self.max_requests_per_batch
            if not full or self.block_new_requests:
                return 0
            pauses = reading = 0
            for state in self.active_requests.values():
                budget -= max(1, len(state.remaining_prefill_tokens))
                reading += bool(state.remaining_prefill_tokens)
            running = [s for s in self.active_requests.values() if len(s.generated_tokens) >= turn]
            running.sort(key=_made)
            for request in list(self.waiting_requests_order):
                state = self.waiting_requests[request]
                budget -= len(state.remaining_prefill_tokens)
                # what does not fit into a batch is read in several, alone
                if budget < 0 and (pauses or reading):
                    break
                if not running or _made(running[-1]) - _made(state) < turn:
                    break
                self._put_back(running.pop())
                pauses += 1
            return pauses

        def _put_back(self, state: Any) -> None:
            """Let an answer wait for its next turn, as transformers does when its cache is full."""
            again = state.create_equivalent_initial_request()
            state._status = requests.RequestStatus.FINISHED
            self.finish_request(state.request_id)
            self.add_waiting_request(again)

    mapping: dict[str, Any] = theirs.SCHEDULER_MAPPING
    for name, sign, kind, turns in (
        ("forelen_sjf", 1.0, "mean", False),
        ("forelen_lpt", -1.0, "mean", False),
        ("forelen_gittins", 1.0, "effective", False),
        ("forelen_plan", 1.0, "planned", False),
        ("forelen_turns", 1.0, "mean", True),
    ):
        made = {"name": name, "sign": sign, "kind": kind, "turns": turns}
        mapping[name] = type(name, (LengthScheduler,), made)


def _made(state: Any) -> int:
    """Return the tokens of an answer so far, those from before it was put back included."""
    begun = len(state.initial_tokens) - state._true_initial_tokens
    return len(state.generated_tokens) + (begun if state._true_initial_tokens else 0)


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
    turn: int | None = None,
    aging: float = AGING,
    continuous_batching_config: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Answer prompts with the model's ``generate_batch``, scheduled for an objective.

    Args:
        model: A transformers model.
        prompts: Tokens of each prompt.
        found: The predicted length of each answer.
        objective: ``makespan``: shortest first, by turns; ``latency``: shortest first.
        turn: Tokens after which an answer makes way for one that had a turn less; by default a
            third of ``max_new_tokens``. What a paused answer has is read again when it goes on,
            like a prompt; 0 pauses none, and starts them as `plan_order` says for the
            ``max_requests_per_batch`` of the config.
        aging: Tokens that a second of waiting makes up for.
        continuous_batching_config: Of transformers; its scheduler is set.
        **options: Of ``generate_batch``.

    Returns:
        What ``generate_batch`` returns.

    Raises:
        ValueError: Another objective, a number out of range, or turns where none are taken.
        SchedulerError: transformers ran another scheduler.
    """
    from transformers import ContinuousBatchingConfig

    check_choice("objective", objective, tuple(OBJECTIVES))
    if turn is not None and objective != "makespan":
        raise ValueError(message("turn", "none with this objective", turn, 'objective="makespan"'))
    config = continuous_batching_config or ContinuousBatchingConfig()
    config.scheduler_type = OBJECTIVES[objective]
    generation = options.get("generation_config") or model.generation_config
    cap = options.get("max_new_tokens", generation.max_new_tokens)
    order = None
    if turn is None:
        turn = TURN if cap is None else max(1, cap // 3)
    elif turn == 0:
        config.scheduler_type, turn = "forelen_plan", TURN
        order = plan_order(found, config.max_requests_per_batch or _SLOTS, cap=cap)
    table = LengthTable(aging=aging, turn=turn)
    table.put(prompts, found, order)
    with scheduled(table):
        output = model.generate_batch(
            inputs=[list(ids) for ids in prompts], continuous_batching_config=config, **options
        )
    if table.live != [config.scheduler_type]:
        raise SchedulerError(
            f"scheduler: expected {config.scheduler_type} to run, found {table.live or 'another'}"
        )
    return output
