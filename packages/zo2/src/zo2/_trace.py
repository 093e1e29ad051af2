"""Run a model on shapes alone and record what its forward needs: bytes alive, FLOPs.

The model runs on the meta device, so nothing is computed and nothing is allocated. Storages are
followed from the operation that makes them to their end, as an allocator would see them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ForwardTrace", "trace_forward"]


@dataclass(frozen=True)
class ForwardTrace:
    """What one forward of one probe needs, parameters and inputs not counted.

    Attributes:
        flops: Floating-point operations, matrix products and attention.
        boundaries: Bytes alive where the forward enters each block.
        peaks: Greatest bytes alive before the first block, and from each block's entry to the
            next; one more than ``boundaries``.
    """

    flops: float
    boundaries: tuple[int, ...]
    peaks: tuple[int, ...]

    def peak(self, probes: int) -> int:
        """Greatest bytes alive when ``probes`` run in lock-step.

        One probe runs at a time; the others wait where the block that runs is entered.
        """
        waiting = [self.boundaries[0] if self.boundaries else 0, *self.boundaries]
        return max(p + (probes - 1) * wait for p, wait in zip(self.peaks, waiting, strict=True))


def trace_forward(
    model: nn.Module, blocks: Sequence[nn.Module], inputs: dict[str, Any]
) -> ForwardTrace:
    """Trace ``model(**inputs)`` without gradients.

    Args:
        model: The model, on any device; it is left as it is.
        blocks: Its blocks.
        inputs: Keyword arguments; tensors on the meta device.

    Raises:
        Exception: Whatever the model raises when its control flow needs values that the meta
            device does not have.
    """
    # Not at the top: it loads triton, which naming zo2.plan should not.
    from torch.utils.flop_counter import FlopCounterMode

    state = {n: _meta(t) for n, t in model.named_parameters()}
    state |= {n: _meta(t) for n, t in model.named_buffers()}
    alive = _AliveBytes([*state.values(), *tree_leaves(inputs)])
    attention = _StandIns()
    counter = FlopCounterMode(display=False)
    hooks = [b.register_forward_pre_hook(lambda *_: alive.enter_block()) for b in blocks]
    try:
        with torch.no_grad(), counter, alive, attention:
            torch.func.functional_call(model, state, (), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return ForwardTrace(
        flops=float(counter.get_total_flops() + attention.flops),
        boundaries=tuple(alive.boundaries),
        peaks=tuple(alive.peaks),
    )


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _AliveBytes(TorchDispatchMode):
    """Follow every storage from its first appearance to its end."""

    def __init__(self, known: Sequence[Any]) -> None:
        super().__init__()
        self._seen = {_key(t) for t in known if isinstance(t, Tensor)}
        self._ends: dict[int, Any] = {}
        self._now = 0
        self.boundaries: list[int] = []
        self.peaks = [0]

    def enter_block(self) -> None:
        self.boundaries.append(self._now)
        self.peaks.append(self._now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = storage.nbytes()
        self._seen.add(key)
        self._now += nbytes
        self.peaks[-1] = max(self.peaks[-1], self._now)
        self._ends[key] = weakref.finalize(storage, self._end, key, nbytes)

    def _end(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self._ends.pop(key, None)
        self._now -= nbytes


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _StandIns(TorchFunctionMode):
    """Answers for what the meta device cannot do as a GPU would.

    Scaled dot product attention: fused kernels keep no score matrix. The truth of a tensor: models
    ask whether all of a mask is set, to take their fast path; yes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = named["query"], named["key"], named["value"]
        *lead, length, width = query.shape
        pairs = torch.Size(lead).numel() * length * key.shape[-2]
        self.flops += 2.0 * pairs * (width + value.shape[-1])
        return query.new_empty((*lead, length, value.shape[-1]))
