"""Work on a GPU that is recorded once and repeated: launching it takes longer than doing it."""

from __future__ import annotations

import contextlib
import functools
import gc
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor


class Recorder:
    """Records work as CUDA graphs, whose memory each takes over from the one before.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = _stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        # while a graph is left, the memory of the others is not given back
        self._keep = self.record(lambda: torch.zeros(1, device=device))

    def record(self, body: Callable[[], Tensor]) -> Recording:
        """Record what a function does; it must not ask the GPU for anything.

        Args:
            body: Its result is in the same place after each repetition.
        """
        return Recording(body, self)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all recordings on a device.

    Products keep 32 MiB and more for each stream for good: there is one, and that is taken before a
    recording, whose memory could not be given back with it inside.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for dtype in (torch.float32, torch.bfloat16):
            square = torch.zeros(16, 16, dtype=dtype, device=device)
            torch.addmm(square[0], square, square)
    return stream


class Recording:
    """What a function did, to be done again."""

    def __init__(self, body: Callable[[], Tensor], recorder: Recorder) -> None:
        self.graph = torch.cuda.CUDAGraph()
        stream = recorder.stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream), _without_collection():
            self.graph.capture_begin(pool=recorder.pool, capture_error_mode="thread_local")
            try:
                self.result = body()
            except BaseException:
                # what went wrong is told, not that a broken recording cannot end well
                with contextlib.suppress(RuntimeError):
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        torch.cuda.current_stream(stream.device).wait_stream(stream)

    def __call__(self) -> Tensor:
        """Do it again, and return the result, which the next repetition writes over."""
        self.graph.replay()
        return self.result


@contextlib.contextmanager
def _without_collection() -> Generator[None]:
    """Collect no garbage: a recording in it would give memory back, which breaks another one."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
