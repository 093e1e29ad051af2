"""Carry committed steps from the device to the log without making the device wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from zo2.log import FLUSH, SKIPPED, LogRecord, UpdateLog

__all__ = ["History"]


@dataclass(frozen=True)
class _Step:
    step: int
    seed: int
    lr: float
    weight_decay: float
    values: torch.Tensor
    ready: torch.cuda.Event | None


class History:
    """Steps on their way to the host: g, and whether it could be used.

    Attributes:
        log: Where records go, or None.
        skipped: Steps that had no effect so far.
    """

    def __init__(self) -> None:
        self.log: UpdateLog | None = None
        self.skipped = 0
        self._queue: deque[_Step] = deque()
        self._non_finite: int | None = None

    def add(
        self,
        step: int,
        seed: int,
        lr: float,
        weight_decay: float,
        g: torch.Tensor,
        ok: torch.Tensor,
    ) -> None:
        """Queue a step, and log those whose values have arrived."""
        packed = torch.cat([g, ok.to(g.dtype).view(1)])
        ready = None
        if packed.is_cuda:
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            packed, ready = host, torch.cuda.Event()
            ready.record()
        self._queue.append(_Step(step, seed, lr, weight_decay, packed, ready))
        self.drain(wait=False)

    def flush_record(self, step: int, seed: int) -> None:
        """Log that every block is folded after ``step`` updates."""
        self.drain(wait=True)
        if self.log is not None:
            q = self.log.dtype["g"].shape[0]
            self.log.append(LogRecord(step, seed, 0.0, 0.0, [0.0] * q, FLUSH))

    def drain(self, *, wait: bool) -> None:
        """Log the steps whose values have arrived; with ``wait``, all of them.

        Raises:
            FloatingPointError: Two steps in a row had losses that were not finite.
        """
        while self._queue:
            item = self._queue[0]
            if item.ready is not None and not item.ready.query():
                if not wait:
                    return
                item.ready.synchronize()
            self._queue.popleft()
            self._record(item)
        if wait and self.log is not None:
            self.log.sync()

    def _record(self, item: _Step) -> None:
        *g, ok = item.values.tolist()
        if self.log is not None:
            flags = 0 if ok else SKIPPED
            record = LogRecord(item.step, item.seed, item.lr, item.weight_decay, g, flags)
            self.log.append(record)
        if ok:
            self._non_finite = None
            return
        self.skipped += 1
        if all(abs(x) < float("inf") for x in g):
            self._non_finite = None
            return
        if self._non_finite == item.step - 1:
            raise FloatingPointError(
                f"the losses of steps {item.step - 1} and {item.step} were not finite (g = {g}); "
                "both were skipped. Look at the batches of these steps, lower the learning rate "
                "or eps, or compute in float32"
            )
        self._non_finite = item.step

    def close(self) -> None:
        """Log everything that is on its way, and close the log."""
        try:
            self.drain(wait=True)
        finally:
            if self.log is not None:
                self.log.close()
                self.log = None
