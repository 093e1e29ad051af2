"""What sampling gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: By the numbers that the device writes.
FINISH_REASONS = ("running", "stop", "length", "not_finite")


@dataclass(frozen=True)
class Completion:
    """One sample.

    Attributes:
        prompt_index: Of its prompt among those given.
        sample_index: Its number among the samples of the same prompt tokens.
        ids: int64 ``(L,)`` on the CPU, its tokens with the end-of-sequence token.
        logprobs: float32 ``(L,)`` on the CPU.
        finish_reason: ``stop``, ``length``, or ``not_finite``: a logit was NaN or infinite, and
            the sample ends before that token.
    """

    prompt_index: int
    sample_index: int
    ids: Tensor
    logprobs: Tensor
    finish_reason: str


@dataclass(frozen=True)
class SamplingStats:
    """How it went.

    Attributes:
        policy: That the samples were ordered by.
        decode_steps: Forward passes over the slots until the last sample was done.
        lower_bound: Passes that no order could have done without, now that lengths are known.
        slot_utilisation: The share of slot steps that made a token.
        slots: Samples decoded at once.
        prefill_tokens: Prompt tokens computed: those of each unique prompt, once.
        new_tokens: Of all samples.
        kv_bytes: Of keys and values on the device.
        parked_bytes: Most bytes of parked samples in host memory at a time.
        host_syncs: How often the host looked at the device.
        swaps: Samples taken out of their slots.
        graph_captures: CUDA graphs recorded during this call.
        prefill_seconds: Prompts and first tokens.
        decode_seconds: The rest.
    """

    policy: str
    decode_steps: int
    lower_bound: int
    slot_utilisation: float
    slots: int
    prefill_tokens: int
    new_tokens: int
    kv_bytes: int
    parked_bytes: int
    host_syncs: int
    swaps: int
    graph_captures: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def over_bound(self) -> float:
        """Decode steps over their lower bound."""
        return self.decode_steps / self.lower_bound if self.lower_bound else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return all by name."""
        return asdict(self) | {"over_bound": self.over_bound}


@dataclass(frozen=True)
class SamplingOutput:
    """All samples, those of the first prompt first.

    Attributes:
        completion_ids: Token ids of each sample, with the end-of-sequence token.
        logprobs: As many log-probabilities.
        finish_reason: See `Completion`.
        prompt_index: Of each sample.
        sample_index: Of each sample.
        stats: Of the whole call.
    """

    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]
    prompt_index: list[int]
    sample_index: list[int]
    stats: SamplingStats = field(repr=False)
