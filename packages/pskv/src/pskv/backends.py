"""Ways to attend to a prefix, and the choice between them by measurement."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import check_choice
from shared_kernels._library import interpreting

if TYPE_CHECKING:
    from collections.abc import Callable

#: Prefixes of up to so many times the rows' length may be quicker to pass again.
_SHORT = 2
#: Calls that each backend is given before one is chosen: enough for a pass to be recorded and run.
_TRIALS = 5
BACKENDS = ("auto", "fused", "split", "layerwise", "replicate", "none")


def check_backend(backend: str, device: torch.device) -> str:
    """Refuse a backend that cannot run on a device.

    Raises:
        ValueError: Unknown, or ``fused`` without a GPU.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "fused" and device.type != "cuda" and not interpreting():
        raise ValueError(
            f"backend: 'fused' needs a CUDA device, the model is on {device}; use 'split'"
        )
    return backend


class AutoBackend:
    """Times each backend that can work on real calls of about one size; the fastest goes on."""

    def __init__(self, device: torch.device, *, deterministic: bool) -> None:
        self.device = device
        self.best = "fused" if device.type == "cuda" else "split"
        self.deterministic = deterministic
        self.seconds: dict[tuple[int, ...], dict[str, list[float]]] = {}

    def choose(
        self, rows: int, prefix: int, widest: int, state_bytes: int, *, plain: bool
    ) -> tuple[str, Callable[[float], None] | None]:
        """Return a backend, and what to tell the seconds of the call, if it is still timed.

        Args:
            rows: Continuations.
            prefix: Tokens of the prefix.
            widest: Tokens of the longest continuation.
            state_bytes: Keys and values of a token.
            plain: Whether whole rows can be passed as token ids.
        """
        if self.deterministic or not rows:
            return self.best, None
        size = (*(x.bit_length() for x in (rows, prefix, widest)), int(plain))
        known = self.seconds.setdefault(size, {})
        small = plain and prefix <= _SHORT * widest
        for backend in self._candidates(rows * (prefix + widest) * state_bytes, small):
            seconds = known.setdefault(backend, [])
            if len(seconds) < _TRIALS:
                return backend, partial(self._note, seconds, rows * widest)
        # the first call of a size also compiles and warms up; noise only adds
        return min(known, key=lambda backend: min(known[backend][1:])), None

    def _note(self, trials: list[float], tokens: int, seconds: float) -> None:
        trials.append(seconds / max(1, tokens))

    def _candidates(self, copies: int, small: bool) -> list[str]:
        """Return backends worth a trial.

        Copies must be small beside the free memory, and a prefix that is passed again short.
        """
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
        else:
            free = 2 << 30
        copying = ["replicate", "layerwise"] if copies < free // 8 else []
        return [self.best, *copying, *(["none"] if small else [])]
