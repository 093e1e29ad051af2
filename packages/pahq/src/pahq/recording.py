"""Work on a GPU that is recorded once and repeated: launching it takes longer than doing it."""

from __future__ import annotations

import contextlib
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
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        # while a graph is left, the memory of the others is not given back
        self._keep = self.record(lambda: torch.zeros(1, device=device))

    def record(self, body: Callable[[], Tensor]) -> Recording:
        """Record what a function does; it must not ask the GPU for anything.

        Args:
            body: Its result is in the same place after each repetition.
        """
        return Recording(body, self)


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
