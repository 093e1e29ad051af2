"""Interleaved timing of arms in one process, and their peak memory.

Every round runs every arm once, in an order shuffled anew, so that drift of clocks, temperature
and other load falls on all arms alike and a ratio can be taken round by round.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import psutil
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared_kernels.bench.arms import Arm, Workload

_FLUSH_BYTES_MIN = 256 << 20
_MEMORY_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure.

    Rounds continue until there are ``min_rounds`` of them and ``min_seconds`` have passed, and
    stop early after ``max_seconds`` or ``max_rounds``.

    Attributes:
        warmup: Untimed rounds (compilation, caches, clocks), fewer when one round already takes a
            quarter of ``max_seconds``.
        min_rounds: Rounds that a full measurement has.
        max_rounds: Upper bound for short arms.
        min_seconds: Short arms repeat for at least this long.
        max_seconds: Time budget of a workload; at least three rounds are always run.
    """

    warmup: int = 3
    min_rounds: int = 30
    max_rounds: int = 300
    min_seconds: float = 2.0
    max_seconds: float = 60.0

    def finished(self, rounds: int, seconds: float) -> bool:
        """Tell whether ``rounds`` rounds that took ``seconds`` are enough."""
        if rounds >= self.max_rounds:
            return True
        if rounds >= self.min_rounds and seconds >= self.min_seconds:
            return True
        return rounds >= min(3, self.min_rounds) and seconds >= self.max_seconds


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times and peak memory of one arm.

    Attributes:
        seconds: One entry per round; entry ``i`` of every arm is from the same round.
        peak_device_bytes: Device memory allocated during a call on top of what was allocated
            before it; ``None`` on the CPU.
        peak_host_bytes: Growth of the resident set during a call, sampled; memory that the
            process already holds and reuses is not seen.
        error: Why the arm did not run (out of device memory), else ``None``.
    """

    seconds: list[float] = field(default_factory=list)
    peak_device_bytes: int | None = None
    peak_host_bytes: int = 0
    error: str | None = None


class Clock(Protocol):
    """Times one call; the seconds are read after the round so that reading disturbs nothing."""

    def time(self, fn: Callable[[], object]) -> Callable[[], float]:
        """Call ``fn`` and return a function that gives the seconds it took."""


class WallClock:
    """Host clock; on a GPU between two synchronisations of the device."""

    def __init__(self, device: str) -> None:
        self._synchronize = torch.cuda.synchronize if device.startswith("cuda") else None

    def time(self, fn: Callable[[], object]) -> Callable[[], float]:
        """Call ``fn`` and return a function that gives the seconds it took."""
        if self._synchronize:
            self._synchronize()
        start = time.perf_counter()
        fn()
        if self._synchronize:
            self._synchronize()
        seconds = time.perf_counter() - start
        return lambda: seconds


class EventClock:
    """CUDA events on the current stream, optionally after overwriting the L2 cache."""

    def __init__(self, device: str, *, flush_l2: bool) -> None:
        self._scratch: torch.Tensor | None = None
        if flush_l2:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            size = max(2 * l2_bytes, _FLUSH_BYTES_MIN)
            self._scratch = torch.empty(size, dtype=torch.int8, device=device)

    def time(self, fn: Callable[[], object]) -> Callable[[], float]:
        """Call ``fn`` and return a function that waits and gives the seconds it took."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        if self._scratch is not None:
            # The memset also keeps the device busy while the host queues fn, which hides the
            # latency of the launch.
            self._scratch.zero_()
        start.record()
        fn()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) * 1e-3

        return seconds


class ReturnedClock:
    """The seconds that the callable measured itself and returns."""

    def time(self, fn: Callable[[], object]) -> Callable[[], float]:
        """Call ``fn`` and return a function that gives the seconds it returned.

        Raises:
            TypeError: It returned something else.
        """
        seconds = fn()
        if not isinstance(seconds, float):
            raise TypeError(f"expected seconds from an arm with clock 'returned'; got {seconds!r}")
        return lambda: seconds


def make_clock(workload: Workload) -> Clock:
    """Return the clock that ``workload`` asks for."""
    if workload.clock == "returned":
        return ReturnedClock()
    on_gpu = workload.device.startswith("cuda")
    if workload.clock == "events" or (workload.clock == "auto" and on_gpu):
        return EventClock(workload.device, flush_l2=workload.flush_l2)
    return WallClock(workload.device)


def measure(
    workload: Workload, plan: Plan | None = None, clock: Clock | None = None
) -> dict[str, Measurement]:
    """Time the arms of ``workload`` round by round and measure their peak memory.

    The correctness gate is not called here: ``run_workload`` calls it first.

    Args:
        workload: What to run.
        plan: How long.
        clock: Instead of the one the workload asks for.

    Returns:
        A measurement for each arm, by name, in the order of the workload.
    """
    plan = plan or Plan()
    clock = clock or make_clock(workload)
    arms = {arm.name: arm for arm in workload.arms}
    failed = _warm_up(arms, plan, workload.device)
    running = [arm for name, arm in arms.items() if name not in failed]
    memory = {arm.name: _peak_memory(arm, workload.device) for arm in running}
    seconds = _timed_rounds(running, plan, clock)
    measurements = {}
    for name in arms:
        if name in failed:
            measurements[name] = Measurement(error=failed[name])
        else:
            device_bytes, host_bytes = memory[name]
            measurements[name] = Measurement(
                seconds=seconds[name], peak_device_bytes=device_bytes, peak_host_bytes=host_bytes
            )
    return measurements


def _timed_rounds(arms: list[Arm], plan: Plan, clock: Clock) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    order = list(arms)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin, rounds = time.perf_counter(), 0
        while not plan.finished(rounds, time.perf_counter() - begin):
            shuffle(order)
            readers = [(arm.name, _timed_call(arm, clock)) for arm in order]
            for name, read in readers:
                seconds[name].append(read())
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return seconds


def _timed_call(arm: Arm, clock: Clock) -> Callable[[], float]:
    if arm.setup:
        arm.setup()
    read = clock.time(arm.fn)
    if arm.teardown:
        arm.teardown()
    return read


def _untimed_call(arm: Arm) -> None:
    if arm.setup:
        arm.setup()
    arm.fn()
    if arm.teardown:
        arm.teardown()


def _warm_up(arms: dict[str, Arm], plan: Plan, device: str) -> dict[str, str]:
    """Run every arm ``plan.warmup`` times; return the arms that do not fit the memory."""
    failed: dict[str, str] = {}
    begin = time.perf_counter()
    for done in range(plan.warmup):
        if done and time.perf_counter() - begin > plan.max_seconds / 4:
            break
        for name, arm in arms.items():
            if name in failed:
                continue
            try:
                _untimed_call(arm)
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                failed[name] = "out of device memory"
                torch.cuda.empty_cache()
    return failed


def _peak_memory(arm: Arm, device: str) -> tuple[int | None, int]:
    """Return the device bytes (``None`` on the CPU) and host bytes that a call needs."""
    on_gpu = device.startswith("cuda")
    gc.collect()
    sampler = _ResidentSetSampler()
    device_bytes = 0
    begin = time.perf_counter()
    # Very short calls repeat, so that the sampler meets them while they hold their memory.
    while True:
        if arm.setup:
            arm.setup()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with sampler:
            arm.fn()
            if on_gpu:
                torch.cuda.synchronize()
        if on_gpu:
            device_bytes = max(device_bytes, torch.cuda.max_memory_allocated() - before)
        if arm.teardown:
            arm.teardown()
        if time.perf_counter() - begin > _MEMORY_SECONDS:
            return (device_bytes if on_gpu else None), sampler.growth


class _ResidentSetSampler:
    """Largest growth of this process's resident set while the context is entered, in bytes."""

    def __init__(self, interval: float = 0.001) -> None:
        self.growth = 0
        self._process = psutil.Process()
        self._interval = interval

    def __enter__(self) -> None:
        self._before = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        self.growth = max(self.growth, self._process.memory_info().rss - self._before)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()
