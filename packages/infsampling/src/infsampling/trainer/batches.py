"""Prompts of each step, and the micro batches that its completions are learned from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.ops.prefix_attention.training import PackedPrompts
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


class StepSampler(Sampler[list[int]]):
    """Indices of the prompts of each step, as often as the step has micro batches.

    The stock loop draws a batch for every micro batch; all of a step are the same here, and the
    first of them is sampled from. Batches of different processes follow one another, so that
    handing them out in turn gives each process its own prompts.

    Args:
        examples: In the data set.
        prompts: Of a step on one process.
        repeats: Micro batches that learn from the prompts' completions.
        processes: That train together.
        seed: Of the order, together with the epoch; None goes through in order.
    """

    def __init__(
        self, examples: int, prompts: int, repeats: int, processes: int, seed: int | None
    ) -> None:
        self.batch_size, self.drop_last = prompts, True
        self.examples, self.repeats, self.processes = examples, repeats, processes
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.examples // (self.batch_size * self.processes) * self.repeats * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            order = list(range(self.examples))
        else:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.examples, generator=generator).tolist()
        whole = self.batch_size * self.processes
        for first in range(0, self.examples - whole + 1, whole):
            for _ in range(self.repeats):
                for process in range(self.processes):
                    start = first + process * self.batch_size
                    yield order[start : start + self.batch_size]


@dataclass
class Samples:
    """Completions of one step on one process, groups one after the other.

    Attributes:
        prompts: Token ids of the prompt of each.
        completions: Token ids of each.
        logprobs: Of the sampler.
        cut: Whether each was cut at the most tokens.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[list[float]]
    cut: list[bool]


def micro_batches(
    samples: Samples, advantages: Tensor, counted: Sequence[bool], parts: int
) -> list[dict[str, Any]]:
    """Cut a step into parts of equally many completions, each packed behind its prompts.

    Returns:
        For each part its ``number``; ``input_ids`` and ``position_ids`` ``(1, T)``;
        ``predecessors`` and ``targets`` ``(n,)``: where each completion token is predicted, and the
        token; ``lengths`` of the completions; ``advantages``, ``mask`` and the sampler's
        ``logprobs`` ``(B, L)``; and the `PackedPrompts` as ``layout``.
    """
    size = len(samples.completions) // parts
    found = []
    for first in range(0, len(samples.completions), size):
        here = range(first, first + size)
        starts = [i for i in here if i == first or samples.prompts[i] != samples.prompts[i - 1]]
        bounds = [*starts, first + size]
        prompts = [samples.prompts[i] for i in starts]
        own = [samples.completions[a:b] for a, b in pairwise(bounds)]
        layout = PackedPrompts.build([len(p) for p in prompts], [[len(c) for c in o] for o in own])
        targets = [token for i in here for token in samples.completions[i]]
        lengths = [len(samples.completions[i]) for i in here]
        mask = pad_sequence(
            [torch.full((n,), float(counted[i])) for i, n in zip(here, lengths, strict=True)], True
        )
        found.append(
            {
                "number": len(found),
                "input_ids": torch.tensor([[t for p in prompts for t in p] + targets]),
                "position_ids": layout.position_ids()[None],
                "predecessors": layout.predecessors(),
                "targets": torch.tensor(targets),
                "advantages": advantages[first : first + size],
                "mask": mask,
                "logprobs": pad_sequence(
                    [torch.tensor(samples.logprobs[i]) for i in here], batch_first=True
                ),
                "lengths": lengths,
                "layout": layout,
            }
        )
    return found
