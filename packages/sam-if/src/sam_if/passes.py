"""What the second pass of a step must find as the first did, and leave as it was."""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

#: What trainers of trl count while they compute a loss.
_COUNTS = ("_metrics", "_total_train_tokens")


class RandomState:
    """The state of chance now: of torch on the CPU and on devices, of numpy and of Python.

    Args:
        devices: Those of the model.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._torch = torch.get_rng_state()
        # not a Generator: what models draw from is numpy's global state
        self._numpy, self._python = np.random.get_state(), random.getstate()  # noqa: NPY002
        self._devices: list[tuple[Any, tuple[Any, ...], torch.Tensor]] = []
        for device in devices:
            if device.type not in ("cpu", "meta"):
                module: Any = torch.get_device_module(device)
                # of some there is but one
                which = () if device.type == "mps" else (device,)
                self._devices.append((module, which, module.get_rng_state(*which)))

    def restore(self) -> None:
        """Draw from here on what was drawn then."""
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)
        for module, which, state in self._devices:
            module.set_rng_state(state, *which)


class RunningStatistics:
    """Running mean and variance of a model's batch and instance norms.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        kind = nn.modules.batchnorm._NormBase
        self._layers = [m for m in model.modules() if isinstance(m, kind) and m.track_running_stats]

    def freeze(self) -> None:
        """Use them, and do not update them, until the model's ``train()``."""
        for layer in self._layers:
            layer.training = False

    @contextmanager
    def kept(self) -> Generator[None]:
        """Put them back afterwards, as they are now."""
        buffers = [buffer for layer in self._layers for buffer in layer.buffers(recurse=False)]
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)


@contextmanager
def uncounted(trainer: Any) -> Generator[None]:
    """Forget afterwards what a trainer of trl counts meanwhile, which it would log twice."""
    own = vars(trainer)
    before = {name: copy.deepcopy(own[name]) for name in _COUNTS if name in own}
    try:
        yield
    finally:
        own.update(before)
