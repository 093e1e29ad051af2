"""What a scorer returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pskv.work import Work


@dataclass(frozen=True, eq=False)
class ScoreOutput:
    """Log-probabilities of continuations, in the order in which they were given.

    Attributes:
        logprobs: float32 ``(N,)`` on the CPU, in nats: the sum over a row's targets, or the mean.
        token_logprobs: For each row float32 ``(targets,)``.
        token_lse: For each row float32 ``(targets,)``, the log-sum-exp of the logits that each
            target is chosen from; a target's logit is its log-probability plus this.
        token_is_greedy: For each row bool ``(targets,)``, whether a target is the likeliest token
            at its place.
        is_greedy: bool ``(N,)``, whether all of a row's are.
        num_tokens: int64 ``(N,)``, targets of each row.
        stats: What was done: backend, tokens computed, tokens that one pass per row computes,
            forward passes, seconds.
    """

    logprobs: Tensor
    token_logprobs: list[Tensor]
    token_lse: list[Tensor]
    token_is_greedy: list[Tensor]
    is_greedy: Tensor
    num_tokens: Tensor
    stats: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, work: Work, prefix: int, reduction: str, backend: str, seconds: float
    ) -> ScoreOutput:
        """Gather the results of rows behind a prefix of so many tokens."""
        values, lse, greedy = work.results.cpu()
        greedy = greedy == 1
        counts = np.diff(work.bounds)
        number = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, number, values.double())
        wrong = torch.zeros(len(counts), dtype=torch.int64).index_add_(0, number, (~greedy).long())
        tokens = torch.from_numpy(counts)
        if reduction == "mean":
            sums = sums / tokens
        stats = {
            "backend": backend,
            "tokens": work.computed,
            "tokens_without_sharing": sum(prefix + len(row) for row in work.rows),
            "passes": work.passes,
            "seconds": seconds,
        }
        parts = counts.tolist()
        return cls(
            sums.float(), list(values.split(parts)), list(lse.split(parts)),
            list(greedy.split(parts)), wrong == 0, tokens, stats,
        )  # fmt: skip

    def broken(self) -> int | None:
        """Return the first row with a log-probability that is no number, or None."""
        bad = (self.logprobs.isnan() | (self.logprobs == float("inf"))).nonzero()
        return int(bad[0]) if len(bad) else None
