"""How many tokens one forward pass takes, and what happens when memory runs out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

#: More tokens in a pass make no kernel faster.
LARGEST = 16384
_ON_CPU = 4096
_FIRST = 2048
_REGROW = 32


@dataclass
class MicroBatch:
    """Tokens of a forward pass: fixed, or fitted to the memory that is free.

    Peak memory grows by the same number of bytes with every token, so the first pass tells what
    fits. Halved when memory runs out, and doubled again, up to what was first found, after 32
    passes that fit.

    Attributes:
        tokens: At most this many, if a single row does not need more.
        fitted: Whether ``tokens`` needs no first pass any more.
        fits: Tokens that would fit, however useless so many are; 0 until known.
    """

    tokens: int
    fitted: bool = True
    ceiling: int = LARGEST
    successes: int = 0
    fits: int = 0

    @classmethod
    def make(cls, setting: int | str, device: torch.device) -> MicroBatch:
        """Make one from a number of tokens or "auto"."""
        if setting == "auto":
            on_gpu = device.type == "cuda"
            return cls(_FIRST if on_gpu else _ON_CPU, fitted=not on_gpu)
        if isinstance(setting, bool) or not isinstance(setting, int) or setting < 1:
            raise ValueError(
                f'micro_batch: expected "auto" or a number of tokens of at least 1, got {setting!r}'
            )
        return cls(setting, ceiling=setting)

    def fit(self, tokens: int, used: int, free: int) -> None:
        """Take note of a first pass that needed ``used`` bytes while ``free`` were free."""
        self.fitted = True
        self.fits = int(0.9 * free / max(1.0, used / tokens))
        self.ceiling = max(_FIRST, min(LARGEST, self.fits))
        self.tokens = self.ceiling

    def succeeded(self) -> None:
        """Take note of a pass that fitted."""
        self.successes += 1
        if self.successes >= _REGROW and self.tokens < self.ceiling:
            self.tokens, self.successes = min(self.ceiling, 2 * self.tokens), 0

    def failed(self, tokens: int) -> None:
        """Take note that ``tokens`` were too many."""
        self.tokens, self.successes, self.fitted = max(1, min(self.tokens, tokens) // 2), 0, True


def attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Run ``work``; if memory runs out, return the message instead of its result.

    The exception is gone when this returns, and with it the tensors that its traceback held.
    """
    try:
        return work(), None
    except Exception as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        return None, str(error)
