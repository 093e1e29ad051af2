"""What an order of requests does to a server with continuous batching."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from shared_kernels._checks import check_choice, check_range, message

POLICIES = ("fifo", "sjf", "lpt", "turns")
#: Tokens of a turn, if nothing is known of the longest answer.
TURN = 128
Policy = Callable[[Sequence[int], float], int]
"""Of the waiting requests at a time, which goes first: its place in the list."""


@dataclass(frozen=True)
class Trace:
    """Requests.

    Attributes:
        lengths: int ``(N,)``, tokens that each answer will have.
        arrivals: float ``(N,)``, in steps.
    """

    lengths: np.ndarray
    arrivals: np.ndarray

    @classmethod
    def at_once(cls, lengths: np.ndarray) -> Trace:
        """Return requests that are all there at the beginning."""
        return cls(np.asarray(lengths), np.zeros(len(lengths)))


@dataclass(frozen=True)
class Outcome:
    """What happened, in steps of one token.

    Attributes:
        makespan: The last end.
        mean_completion: Mean time from arrival to end.
        p99_completion: 99th percentile of it.
        longest_wait: The longest time from arrival to start.
        idle: The share of slot time that was empty before the last end.
        ends: float ``(N,)``.
        order: Requests as they were started.
        pauses: How often an answer was paused.
    """

    makespan: float
    mean_completion: float
    p99_completion: float
    longest_wait: float
    idle: float
    ends: np.ndarray
    order: list[int]
    pauses: int = 0


def simulate(
    trace: Trace,
    policy: str | Policy,
    slots: int,
    *,
    predicted: np.ndarray | None = None,
    aging: float = 0.0,
    turn: int = TURN,
    resume: int = 1,
) -> Outcome:
    """Run requests through ``slots`` places, each of which makes one token of an answer a step.

    A place that falls free is given to the waiting request that the policy puts first. The time of
    a prefill, and that of a step's dependence on the number of answers, are left out.

    Args:
        trace: Requests.
        policy: ``fifo``, ``sjf`` (shortest prediction first), ``lpt`` (longest), ``turns``
            (shortest first, and an answer makes way for one that had a turn less), or a function.
        slots: Places.
        predicted: float ``(N,)``, what all but ``fifo`` go by; never the true lengths, unless
            you want to know what these would do.
        aging: Tokens that a step of waiting makes up for.
        turn: Tokens after which an answer makes way, with ``turns``.
        resume: Steps until an answer that was paused goes on, once it has a place.

    Raises:
        ValueError: No predictions for a policy that needs them, or a number out of range.
    """
    check_range("slots", slots, 1, 1 << 31, "answers that are made at the same time")
    check_range("turn", turn, 1, 1 << 31, "tokens until an answer makes way")
    check_range("resume", resume, 0, 1 << 31, "passes that reading an answer again takes")
    count = len(trace.lengths)
    choose = None if isinstance(policy, str) else policy
    if isinstance(policy, str):
        check_choice("policy", policy, POLICIES)
        if policy != "fifo" and predicted is None:
            raise ValueError(message("predicted", "a length for each request", None, "predict"))
        base = np.zeros(count) if policy == "fifo" else np.asarray(predicted, dtype=np.float64)
        if policy == "turns":
            return _by_turns(trace, slots, base, aging, turn, resume)
        sign = {"fifo": 0.0, "sjf": 1.0, "lpt": -1.0}[policy]
        age = 1.0 if policy == "fifo" else aging
        keys = sign * base + age * trace.arrivals
    arriving: list[int] = np.argsort(trace.arrivals, kind="stable")[::-1].tolist()
    waiting: list[Any] = []
    running: list[float] = []
    ends, starts = np.zeros(count), np.zeros(count)
    order: list[int] = []
    now = 0.0
    while arriving or waiting:
        if len(running) == slots:
            now = max(now, heapq.heappop(running))
        if not waiting and arriving:
            now = max(now, float(trace.arrivals[arriving[-1]]))
        while running and running[0] <= now:
            heapq.heappop(running)
        while arriving and trace.arrivals[arriving[-1]] <= now:
            request = arriving.pop()
            if choose is None:
                heapq.heappush(waiting, (keys[request], trace.arrivals[request], request))
            else:
                waiting.append(request)
        while waiting and len(running) < slots:
            if choose is None:
                request = heapq.heappop(waiting)[-1]
            else:
                request = waiting.pop(choose(waiting, now))
            order.append(request)
            starts[request], ends[request] = now, now + float(trace.lengths[request])
            heapq.heappush(running, ends[request])
    return _outcome(trace, slots, starts, ends, order)


@dataclass
class _Running:
    """An answer in a place: its tokens before it got there, and when it gets its next one."""

    request: int
    before: int
    since: int

    def made(self, now: int) -> int:
        return self.before + max(0, now - self.since)


def _by_turns(
    trace: Trace, slots: int, predicted: np.ndarray, aging: float, turn: int, resume: int
) -> Outcome:
    """Run requests step by step, as the scheduler ``forelen_turns`` does."""
    count = len(trace.lengths)
    longest = max(turn, float(predicted.max())) if count else turn
    ends, starts = np.zeros(count), np.full(count, -1.0)
    arriving: list[int] = np.argsort(trace.arrivals, kind="stable")[::-1].tolist()
    waiting: list[tuple[float, float, int, int]] = []
    running: list[_Running] = []
    order: list[int] = []
    now = pauses = 0

    def wait(request: int, made: int, since: float) -> None:
        key = predicted[request] + made // turn * longest + aging * since
        heapq.heappush(waiting, (key, since, request, made))

    while arriving or waiting or running:
        for place in [p for p in running if p.made(now) >= trace.lengths[p.request]]:
            running.remove(place)
            ends[place.request] = now
        while arriving and trace.arrivals[arriving[-1]] <= now:
            request = arriving.pop()
            wait(request, 0, float(trace.arrivals[request]))
        while waiting:
            made = waiting[0][-1]
            if len(running) == slots:
                due = [p for p in running if p.made(now) - p.before >= turn]
                # of those alike the last that got its place
                oldest = max(reversed(due), key=lambda p: p.made(now), default=None)
                if oldest is None or oldest.made(now) - made < turn:
                    break
                running.remove(oldest)
            else:
                oldest = None
            request = heapq.heappop(waiting)[2]
            if oldest is not None:
                pauses += 1
                wait(oldest.request, oldest.made(now), float(now))
            if starts[request] < 0:
                starts[request] = now
                order.append(request)
            running.append(_Running(request, made, now + (resume if made else 0)))
        now += 1
        if not running and not waiting and arriving:
            now = max(now, math.ceil(trace.arrivals[arriving[-1]]))
    return _outcome(trace, slots, starts, ends, order, pauses)


def _outcome(
    trace: Trace, slots: int, starts: np.ndarray, ends: np.ndarray, order: list[int],
    pauses: int = 0,
) -> Outcome:  # fmt: skip
    count = len(trace.lengths)
    completion = ends - trace.arrivals
    makespan = float(ends.max()) if count else 0.0
    begin = float(trace.arrivals.min()) if count else 0.0
    area = slots * (makespan - begin)
    return Outcome(
        makespan=makespan,
        mean_completion=float(completion.mean()) if count else 0.0,
        p99_completion=float(np.quantile(completion, 0.99)) if count else 0.0,
        longest_wait=float((starts - trace.arrivals).max()) if count else 0.0,
        idle=1 - float(trace.lengths.sum()) / area if area else 0.0,
        ends=ends,
        order=order,
        pauses=pauses,
    )
