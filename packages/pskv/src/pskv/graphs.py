"""Forward passes recorded as CUDA graphs, where launching kernels takes longer than the kernels."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.ops.prefix_attention import FixedLayout, PrefixLayout
from torch.nn.modules import module as nn_module

from pskv import support

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor

    Forward = Callable[[list[Tensor], PrefixLayout | None], Tensor]

_LOG = logging.getLogger(__name__)
#: Kernels that wait for the host take about as long as the host.
_BOUND = 1.2
#: Passes that are timed before one is recorded; the first also compiles.
_TRIALS = 2
_MOST_RECORDINGS = 8
_MOST_TRIALS = 256


def rounded(tokens: int) -> int:
    """Return the number of tokens that a recorded pass is padded to: at most an eighth more."""
    step = max(8, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _settings() -> tuple[Any, ...]:
    """Return the settings of torch that decide which kernels a pass takes."""
    autocast = torch.is_autocast_enabled("cuda")
    return (
        torch.get_autocast_dtype("cuda") if autocast else None,
        torch.get_float32_matmul_precision(),
    )


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    layout: FixedLayout | None
    output: Tensor

    def replay(self, inputs: list[Tensor], layout: PrefixLayout | None) -> bool:
        """Run on other inputs, if the layout's tables fit."""
        if self.layout is not None and layout is not None and not self.layout.take(layout):
            return False
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        self.graph.replay()
        return True


@dataclass
class _Trial:
    host: float
    begin: torch.cuda.Event
    end: torch.cuda.Event

    def bound_by_host(self) -> bool:
        """Tell, once its kernels have run, whether they waited for the host."""
        return self.end.query() and self.begin.elapsed_time(self.end) < _BOUND * 1e3 * self.host


class Graphs:
    """Records passes of a model that keep coming and wait for the host.

    A pass whose recording fails runs as it did, and no other is tried. Nothing is recorded while a
    module has hooks, which a graph would not call.

    Args:
        model: The model that passes go through.
        device: Where all of it is, if anything is recorded.
        enabled: Whether to record at all.
    """

    def __init__(self, model: Any, device: torch.device, *, enabled: bool) -> None:
        self.model, self.device, self.enabled = model, device, enabled
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._trials: OrderedDict[Hashable, list[_Trial]] = OrderedDict()
        self._pool: Any = None
        #: Recordings made, and passes that ran from one.
        self.recorded = self.replayed = 0

    def wants(self, key: Hashable) -> bool:
        """Tell whether a pass of this kind has been recorded or should be."""
        if not self.enabled:
            return False
        key = (key, *_settings())
        if key not in self._recordings:
            trials = self._trials.get(key, [])
            if len(trials) < _TRIALS or not trials[-1].bound_by_host():
                return False
        if nn_module._has_any_global_hook():
            return False
        return not any(m._forward_hooks or m._forward_pre_hooks for m in support.walk(self.model))

    def timed(self, key: Hashable, forward: Callable[[], Tensor]) -> Tensor:
        """Run a pass as it is, and take note of whether it waits for the host."""
        if not self.enabled:
            return forward()
        # events and recordings belong to the current device, whatever the model's is
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            start = time.perf_counter()
            output = forward()
            host = time.perf_counter() - start
            end.record()
        key = (key, *_settings())
        trials = self._trials.setdefault(key, [])
        trials[:] = [*trials[1 - _TRIALS :], _Trial(host, begin, end)]
        self._trials.move_to_end(key)
        if len(self._trials) > _MOST_TRIALS:
            self._trials.popitem(last=False)
        return output

    def run(
        self, key: Hashable, inputs: list[Tensor], layout: PrefixLayout | None, forward: Forward
    ) -> Tensor | None:
        """Run a pass from its recording, made now if there is none; None if that fails.

        Args:
            key: All that ``forward`` reads besides its arguments, and their shapes.
            inputs: What differs from pass to pass.
            layout: Which keys the rows see, if the pass is packed.
            forward: Runs the pass on the device without waiting for it.

        Returns:
            What ``forward`` does, valid until the next pass.
        """
        key = (key, *_settings())
        recording = self._recordings.get(key)
        with torch.cuda.device(self.device):
            if recording is None or not recording.replay(inputs, layout):
                recording = self._record(inputs, layout, forward)
                if recording is None:
                    return None
                self._recordings[key] = recording
                if len(self._recordings) > _MOST_RECORDINGS:
                    self._recordings.popitem(last=False)
                recording.graph.replay()
        self._recordings.move_to_end(key)
        self.replayed += 1
        return recording.output

    def _record(
        self, inputs: list[Tensor], layout: PrefixLayout | None, forward: Forward
    ) -> _Recording | None:
        places = [x.clone() for x in inputs]
        fixed = None if layout is None else FixedLayout(layout.rows)
        side = torch.cuda.Stream(places[0].device)
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                # libraries and tables are set up outside the graph
                forward(places, fixed)
            torch.cuda.current_stream().wait_stream(side)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = forward(places, fixed)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _LOG.info("passes are not recorded as CUDA graphs: %s", error)
            self.enabled = False
            self.clear()
            return None
        self.recorded += 1
        return _Recording(graph, places, fixed, output)

    def clear(self) -> None:
        """Give back the memory that recordings hold."""
        self._recordings.clear()
        self._pool = None
