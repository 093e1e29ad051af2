"""Lock-step probes: several runs of one unchanged model that share each load of a block.

Every probe runs the model in a thread of its own, but only the thread that holds the baton moves.
A probe that reaches a block hands the baton back and waits; the scheduler picks the block that
most probes wait for, loads it once, and lets each of them run it with its own weights. No model
code has to know: control flow, caches and losses are the model's own.

Threads rather than greenlets, because torch keeps grad mode, autocast and the current stream per
thread; each probe starts with the caller's.
"""

from __future__ import annotations

import contextvars
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["Probe", "ProbeCancelledError", "RngState", "ThreadState", "Worker"]


class ProbeCancelledError(BaseException):
    """Ends a probe whose sibling failed; never seen outside the engine."""


class ThreadState:
    """The caller's thread-local torch settings, to be entered on another thread."""

    def __init__(self, device: torch.device) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in dict.fromkeys(("cpu", device.type))
        ]
        self._cache = torch.is_autocast_cache_enabled()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def enter(self, stack: ExitStack) -> None:
        """Apply the settings to the calling thread until ``stack`` closes."""
        if self._stream is not None:
            stack.enter_context(torch.cuda.device(self._stream.device))
            stack.enter_context(torch.cuda.stream(self._stream))
        for kind, dtype, enabled in self._autocast:
            if enabled:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._cache))
        stack.enter_context(torch.inference_mode(self._inference))
        stack.enter_context(torch.set_grad_enabled(self._grad))


class RngState:
    """torch's CPU and CUDA generator states, so that each probe has random streams of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Make these the current states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self._device)


class Worker:
    """A thread that lives as long as the engine and runs one probe after another.

    cuDNN's plans, cuBLAS's handles and OpenMP's teams belong to a thread: with a new thread for
    every step they would all be made anew.
    """

    def __init__(self) -> None:
        self._wake = threading.Lock()
        self._wake.acquire()
        self._job: Callable[[], None] | None = None
        self.thread = threading.Thread(target=self._loop, name="probe", daemon=True)
        self.thread.start()

    def _loop(self) -> None:
        while True:
            self._wake.acquire()
            job, self._job = self._job, None
            if job is None:
                return
            job()
            del job

    def run(self, job: Callable[[], None]) -> None:
        """Start a job; the worker must be idle."""
        self._job = job
        self._wake.release()

    def stop(self) -> None:
        """End the thread once it is idle."""
        self._wake.release()


def _taken() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass
class Probe:
    """One run of ``function`` under one set of weights.

    Attributes:
        function: Called without arguments on the probe's thread.
        variant: Which weights the probe sees; its meaning is the materializer's.
        waiting_for: Index of the block the probe stands before, or -1.
    """

    function: Callable[[], Any]
    variant: Hashable
    waiting_for: int = -1
    done: bool = False
    cancelled: bool = False
    result: Any = None
    error: BaseException | None = None
    rng: RngState | None = None
    _started: bool = False
    # Plain locks, released by the other thread: half the hand-off time of a semaphore.
    _mine: threading.Lock = field(default_factory=_taken, repr=False)
    _back: threading.Lock = field(default_factory=_taken, repr=False)

    def start(
        self, worker: Worker, state: ThreadState, adopt: Callable[[Probe | None], None]
    ) -> None:
        """Give the probe a thread; it does nothing until the first :meth:`resume`."""
        context = contextvars.copy_context()

        def main() -> None:
            self._mine.acquire()
            adopt(self)
            try:
                with ExitStack() as stack:
                    state.enter(stack)
                    if not self.cancelled:
                        self.result = self.function()
            except ProbeCancelledError:
                pass
            except BaseException as error:
                self.error = error
            finally:
                adopt(None)
                self.done, self.waiting_for = True, -1
                self._back.release()

        self._started = True
        worker.run(lambda: context.run(main))

    def resume(self) -> None:
        """Give the probe the baton and wait until it stands before a block, or has ended."""
        self.waiting_for = -1
        self._mine.release()
        self._back.acquire()

    def wait_at(self, block: int) -> None:
        """Called on the probe's thread: hand the baton back and wait for it before ``block``."""
        self.waiting_for = block
        self._back.release()
        self._mine.acquire()
        if self.cancelled:
            raise ProbeCancelledError

    def cancel(self) -> None:
        """End the probe at the block it stands before, if it has not ended."""
        self.cancelled = True
        if self._started and not self.done:
            self._mine.release()
            self._back.acquire()
