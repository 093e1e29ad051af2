"""What the sampler asks of a length predictor, and two that need no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from shared_kernels._checks import check_range, message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class PromptState:
    """What is known of a prompt before its samples begin.

    Attributes:
        ids: Its tokens.
        hidden: float ``(d,)``, the final hidden state of its last token.
        entropy: Of its samples' first token, in nats.
        samples: Numbers of the samples that are wanted.
    """

    ids: Sequence[int]
    hidden: Tensor
    entropy: float
    samples: Sequence[int]


@runtime_checkable
class LengthPredictor(Protocol):
    """Tells how many tokens samples will have; any object with these two methods will do.

    Predictions decide the order of samples and nothing else: tokens do not depend on them.
    """

    def initial(self, prompts: Sequence[PromptState]) -> Sequence[np.ndarray]:
        """Return the expected tokens of each prompt's samples, float ``(n,)`` a prompt."""
        ...

    def finished(self, ids: Sequence[int], lengths: np.ndarray) -> None:
        """Learn how many tokens the samples of a prompt had."""
        ...


class OracleLengths:
    """Knows the lengths, for tests and simulations.

    Args:
        lengths: Of the samples of each prompt, in the order of the prompts.
    """

    def __init__(self, lengths: Sequence[Sequence[float]]) -> None:
        self.lengths = [np.asarray(found, dtype=np.float64) for found in lengths]

    def initial(self, prompts: Sequence[PromptState]) -> list[np.ndarray]:
        """Return them."""
        if len(prompts) != len(self.lengths):
            remedy = "give the lengths of each prompt's samples"
            raise ValueError(
                message("lengths", f"those of {len(prompts)} prompts", len(self.lengths), remedy)
            )
        return self.lengths

    def finished(self, ids: Sequence[int], lengths: np.ndarray) -> None:
        """Learn nothing."""


class AverageLengths:
    """Remembers how long the answers to each prompt were, as an exponential moving average.

    A prompt that is new is expected to be as long as all others on average. It tells prompts apart
    and not the samples of one prompt, which nothing can that looks at the prompt alone.

    Args:
        decay: Weight of what was known before, in [0, 1).
        start: Expected tokens before anything was seen.
    """

    def __init__(self, decay: float = 0.7, start: float = 256.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(message("decay", "a number in [0, 1)", decay, "0 forgets at once"))
        check_range("start", int(start), 1, 1 << 31, "expected tokens")
        self.decay, self.overall = decay, float(start)
        self.known: dict[tuple[int, ...], float] = {}

    def initial(self, prompts: Sequence[PromptState]) -> list[np.ndarray]:
        """Return the average of each prompt, or of all."""
        return [
            np.full(len(prompt.samples), self.known.get(tuple(prompt.ids), self.overall))
            for prompt in prompts
        ]

    def finished(self, ids: Sequence[int], lengths: np.ndarray) -> None:
        """Take the mean length into the averages."""
        if not len(lengths):
            return
        mean, key = float(np.mean(lengths)), tuple(ids)
        before = self.known.get(key, mean)
        self.known[key] = self.decay * before + (1 - self.decay) * mean
        self.overall = self.decay * self.overall + (1 - self.decay) * mean
