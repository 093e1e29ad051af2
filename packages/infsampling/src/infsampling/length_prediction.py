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
        states: float ``(P, d)``, the final hidden states of all its tokens; None unless the
            predictor has an attribute ``wants_states`` that is true.
    """

    ids: Sequence[int]
    hidden: Tensor
    entropy: float
    samples: Sequence[int]
    states: Tensor | None = None


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


@runtime_checkable
class ProgressivePredictor(LengthPredictor, Protocol):
    """Also looks at samples while they grow, and predicts again what is to come.

    With ``lrpt`` the samples are ranked anew by it every ``rerank_every`` steps. With ``lpt`` all
    samples first have ``probe_tokens`` steps (an attribute; 16 without it), and then go on from the
    longest down; there is no probe where it would be a large part of the work. Other policies do
    not ask.

    A predictor that fails, or says what is no number, is not asked again in that call.
    """

    def begin(self, owners: Sequence[int], hidden: Tensor) -> None:
        """Forget all samples: a call begins to decode. Comes after `initial`.

        Args:
            owners: Of each of R samples its prompt, a place in what `initial` was given. The
                samples of a prompt come in the order of their predictions.
            hidden: float ``(lanes, d)``, like those of `update` in shape, dtype and device.
        """
        ...

    def update(self, rows: Tensor, hidden: Tensor, logits: Tensor) -> None:
        """Look at a token more of the samples that are decoded, in every step.

        A step may be recorded as a CUDA graph, which replays what this does on the device: it must
        not wait for the device, and has to keep what it remembers where it was in `begin`. A sample
        may leave its lane and come back to another one; its number stays. Its first token comes
        from its prompt, so the first update of a sample is of that token.

        Args:
            rows: int64 ``(lanes,)``, the number of the sample in each lane; R for a lane without
                one, whose other values say nothing. No other number comes twice.
            hidden: float ``(lanes, d)``, final hidden states of the tokens just read, which is what
                the head reads. Overwritten by the next step, as are ``logits``.
            logits: float ``(lanes, V)``, of the next tokens, neither scaled nor filtered.
        """
        ...

    def remaining(self) -> np.ndarray:
        """Return how many tokens of each sample are expected beyond those of its updates.

        Float ``(R,)``, at least 1, and of samples without an update the whole length. Of samples
        that have ended it may be any number. An upper quantile serves schedules better than the
        mean. This may wait for the device.
        """
        ...


def chosen_policy(policy: str, predictor: LengthPredictor | None) -> str:
    """Return the policy that ``auto`` stands for: turns need no predictions, and rank by none."""
    if policy != "auto":
        return policy
    if predictor is None:
        return "turns"
    return "lrpt" if isinstance(predictor, ProgressivePredictor) else "lpt"


class OracleLengths:
    """Knows the lengths, for tests and simulations.

    Args:
        lengths: Of the samples of each prompt, in the order of the prompts, all of which must be
            held at once (`SamplingConfig.max_resident_prompts`).
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
