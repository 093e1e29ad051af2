"""Copies between the store and the device, and the streams and events that order them.

Three back ends share one interface: ``CudaTransfer`` (registered host memory, asynchronous copies
on two side streams), ``BounceTransfer`` (pageable host memory, copied by a worker thread through
a few small locked buffers) and ``NullTransfer`` (no GPU: plain copies, in order).
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import Protocol

import torch

from shared_kernels.offload.memory import HostBuffer

__all__ = ["BounceTransfer", "CudaTransfer", "NullTransfer", "Token", "Transfer", "make_transfer"]


class Token:
    """Something the device has yet to reach. Waiting for it never blocks the host thread."""

    def wait(self) -> None:
        """Make the current stream wait."""

    def synchronize(self) -> None:
        """Block the host until it is reached."""


class Transfer(Protocol):
    """Asynchronous copies; ``after`` tokens are waited for on the copying stream."""

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: list[Token]) -> Token:
        """Copy host to device."""
        ...

    def download(self, source: torch.Tensor, target: torch.Tensor, after: list[Token]) -> Token:
        """Copy device to host."""
        ...

    def mark(self) -> Token:
        """Return a token for all work queued on the current stream so far."""
        ...

    def synchronize(self) -> None:
        """Block the host until every copy has finished."""
        ...


class NullTransfer:
    """Copies at once, on the calling thread."""

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: list[Token]) -> Token:
        """Copy now."""
        target.copy_(source)
        return Token()

    download = upload

    def mark(self) -> Token:
        """Nothing is ever outstanding."""
        return Token()

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _EventToken(Token):
    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream if stream is not None else torch.cuda.current_stream())

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)

    def synchronize(self) -> None:
        self.event.synchronize()


class CudaTransfer:
    """Asynchronous copies from and to registered host memory on one stream each way."""

    def __init__(self, device: torch.device) -> None:
        self.up = torch.cuda.Stream(device)
        self.down = torch.cuda.Stream(device)

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: list[Token]) -> Token:
        """Queue the copy on the upload stream."""
        return self._copy(self.up, source, target, after)

    def download(self, source: torch.Tensor, target: torch.Tensor, after: list[Token]) -> Token:
        """Queue the copy on the download stream."""
        return self._copy(self.down, source, target, after)

    @staticmethod
    def _copy(
        stream: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor, after: list[Token]
    ) -> Token:
        with torch.cuda.stream(stream):
            for token in after:
                token.wait()
            target.copy_(source, non_blocking=True)
            return _EventToken(stream)

    def mark(self) -> Token:
        """Record an event on the current stream."""
        return _EventToken()

    def synchronize(self) -> None:
        """Wait for both copy streams."""
        self.up.synchronize()
        self.down.synchronize()


class _FutureToken(Token):
    """The event of a copy that a worker thread has yet to queue."""

    def __init__(self) -> None:
        self.queued: Future[Token] = Future()

    def wait(self) -> None:
        self.queued.result().wait()

    def synchronize(self) -> None:
        self.queued.result().synchronize()


class BounceTransfer:
    """Copies pageable host memory through small locked buffers, on a worker thread.

    Waiting for an upload blocks the host until the worker has queued it: the host copy is the
    bottleneck here, and pretending otherwise would only hide it. Jobs run in the order given, so
    a block is never read back before its last write has landed.
    """

    def __init__(self, device: torch.device, *, chunk: int = 32 << 20, buffers: int = 4) -> None:
        self._device = device
        self._chunk = chunk
        self._stream = torch.cuda.Stream(device)
        self._locked = [HostBuffer(chunk, pin="register") for _ in range(buffers)]
        self._busy: list[torch.cuda.Event | None] = [None] * buffers
        self._turn = 0
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="bounce-transfer").start()

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: list[Token]) -> Token:
        """Hand the copy to the worker."""
        return self._submit(self._upload, source, target, after)

    def download(self, source: torch.Tensor, target: torch.Tensor, after: list[Token]) -> Token:
        """Hand the copy to the worker."""
        return self._submit(self._download, source, target, after)

    def mark(self) -> Token:
        """Record an event on the current stream."""
        return _EventToken()

    def synchronize(self) -> None:
        """Wait until the worker is idle and its stream is empty."""
        self._submit(lambda *_: None, None, None, []).synchronize()
        self._stream.synchronize()

    def _submit(self, job, source, target, after) -> Token:
        token = _FutureToken()
        self._jobs.put((job, source, target, after, token))
        return token

    def _work(self) -> None:
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            while True:
                job, source, target, after, token = self._jobs.get()
                try:
                    for earlier in after:
                        earlier.wait()
                    job(source, target)
                    token.queued.set_result(_EventToken(self._stream))
                except BaseException as error:
                    token.queued.set_exception(error)

    def _next(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._locked)
        event = self._busy[self._turn]
        if event is not None:
            event.synchronize()
        return self._locked[self._turn].tensor

    def _release(self) -> None:
        event = torch.cuda.Event()
        event.record(self._stream)
        self._busy[self._turn] = event

    def _upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for start in range(0, source.numel(), self._chunk):
            piece = source[start : start + self._chunk]
            locked = self._next()[: piece.numel()]
            locked.copy_(piece)
            target[start : start + self._chunk].copy_(locked, non_blocking=True)
            self._release()

    def _download(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for start in range(0, source.numel(), self._chunk):
            piece = source[start : start + self._chunk]
            locked = self._next()[: piece.numel()]
            locked.copy_(piece, non_blocking=True)
            self._stream.synchronize()
            target[start : start + self._chunk].copy_(locked)


def make_transfer(device: torch.device, *, registered: bool) -> Transfer:
    """Choose the back end for a device and the kind of host memory."""
    if device.type != "cuda":
        return NullTransfer()
    return CudaTransfer(device) if registered else BounceTransfer(device)
