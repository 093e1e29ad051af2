"""Where prompts and their continuations lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from shared_kernels._checks import message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Segments(NamedTuple):
    """Bounds of varlen attention calls, int32 on one device.

    Attributes:
        own: ``(N + 1,)``, where each prompt and each continuation begins.
        queries: ``(P + 1,)``, where the continuations of each prompt begin, behind the prompts.
        keys: ``(P + 1,)``, where each prompt begins.
    """

    own: Tensor
    queries: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class PackedPrompts:
    """All prompts end to end, and behind them all continuations, prompt by prompt.

    Attributes:
        prompts: Tokens of each prompt, at least one.
        continuations: Of each prompt, tokens of its continuations.
    """

    prompts: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    _made: dict[torch.device, Segments] = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, prompts: Sequence[int], continuations: Sequence[Sequence[int]]) -> PackedPrompts:
        """Make a layout.

        Raises:
            ValueError: A prompt without tokens, a negative number, or lists that differ in length.
        """
        if len(prompts) != len(continuations):
            wanted = f"lists for {len(prompts)} prompts"
            raise ValueError(message("continuations", wanted, len(continuations), "give one each"))
        if min(prompts, default=1) < 1:
            raise ValueError(message("prompts", "at least one token each", min(prompts), "see it"))
        if min((n for own in continuations for n in own), default=0) < 0:
            raise ValueError(message("continuations", "no negative number", "one", "count tokens"))
        return cls(tuple(prompts), tuple(map(tuple, continuations)))

    @functools.cached_property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts: where the continuations begin."""
        return sum(self.prompts)

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens of all."""
        return self.prompt_tokens + sum(map(sum, self.continuations))

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longest continuation."""
        return max((p + max(c, default=0) for p, c in self._pairs()), default=0)

    def position_ids(self) -> Tensor:
        """Return the position of each token in its own text, int64 ``(T,)`` on the CPU."""
        parts = [torch.arange(p) for p in self.prompts]
        parts += [torch.arange(p, p + n) for p, own in self._pairs() for n in own]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def predecessors(self) -> Tensor:
        """Return where each continuation token's prediction stands, int64 ``(T - prompts,)``.

        The token before it: of a continuation's first token, its prompt's last.
        """
        ends = list(accumulate(self.prompts))
        parts, place = [], self.prompt_tokens
        for end, own in zip(ends, self.continuations, strict=True):
            for n in own:
                before = torch.arange(place - 1, place + n - 1)
                before[:1] = end - 1
                parts.append(before)
                place += n
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def segments(self, device: torch.device) -> Segments:
        """Return the bounds on a device."""
        if device not in self._made:
            own = [*self.prompts, *(n for line in self.continuations for n in line)]
            self._made[device] = Segments(
                *(
                    torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)
                    for sizes in (own, map(sum, self.continuations), self.prompts)
                )
            )
        return self._made[device]

    def longest_parts(self) -> tuple[int, int, int]:
        """Return the most tokens of an own part, of a prompt's continuations, and of a prompt."""
        own = [*self.prompts, *(n for line in self.continuations for n in line)]
        groups = map(sum, self.continuations)
        return max(own, default=0), max(groups, default=0), max(self.prompts, default=0)

    def _pairs(self) -> zip[tuple[int, tuple[int, ...]]]:
        return zip(self.prompts, self.continuations, strict=True)
