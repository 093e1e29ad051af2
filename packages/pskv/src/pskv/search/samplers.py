"""Which candidates a step of a coordinate search tries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pskv.search.config import SearchConfig


class Sampler(Protocol):
    """Proposes candidates; one object serves one run."""

    needs_gradient: bool

    def propose(
        self,
        parent: Tensor,
        gradient: Tensor | None,
        allowed: Tensor,
        width: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Return candidates int64 ``(width, s)`` on the CPU.

        Args:
            parent: int64 ``(s,)`` on the CPU.
            gradient: ``(s, V)``, of the loss by the choice of each token, or None.
            allowed: bool ``(V,)`` on the CPU, tokens that may be chosen.
            width: Number of candidates.
            generator: For every draw, on the CPU.
        """


def _replace(
    parent: Tensor, choices: Tensor, width: int, count: int, generator: torch.Generator
) -> Tensor:
    """Put tokens out of ``choices`` (s, k) into ``count`` places of each of ``width`` copies."""
    length, options = choices.shape
    places = torch.rand(width, length, generator=generator).argsort(1)[:, : min(count, length)]
    picked = torch.randint(0, options, places.shape, generator=generator)
    return parent.repeat(width, 1).scatter_(1, places, choices[places, picked])


class GradientSampler:
    """Greedy coordinate gradient (arXiv:2307.15043, algorithm 1).

    Each candidate takes, in a random place, one of the tokens whose gradient promises the most.
    """

    needs_gradient = True

    def __init__(self, topk: int = 256, replace: int = 1) -> None:
        self.topk, self.replace = topk, replace

    def propose(
        self,
        parent: Tensor,
        gradient: Tensor | None,
        allowed: Tensor,
        width: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Return candidates, as `Sampler`."""
        assert gradient is not None
        banned = ~allowed.to(gradient.device)
        scores = (-gradient.float()).masked_fill(banned[: gradient.shape[1]], -torch.inf)
        options = min(self.topk, int(allowed.sum()))
        best = scores.topk(options, dim=1).indices.cpu()
        return _replace(parent, best, width, self.replace, generator)


class MomentumSampler(GradientSampler):
    """The same with gradients averaged over steps (arXiv:2405.01229).

    ``g <- momentum g + (1 - momentum) gradient``.
    """

    def __init__(self, topk: int = 256, replace: int = 1, momentum: float = 0.4) -> None:
        super().__init__(topk, replace)
        self.momentum = momentum
        self.average: Tensor | None = None

    def propose(
        self,
        parent: Tensor,
        gradient: Tensor | None,
        allowed: Tensor,
        width: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Return candidates, as `Sampler`."""
        assert gradient is not None
        self.average = (
            gradient if self.average is None
            else self.momentum * self.average + (1 - self.momentum) * gradient
        )  # fmt: skip
        return super().propose(parent, self.average, allowed, width, generator)


class RandomSampler:
    """Any allowed token in random places: what a gradient has to beat."""

    needs_gradient = False

    def __init__(self, replace: int = 1) -> None:
        self.replace = replace

    def propose(
        self,
        parent: Tensor,
        gradient: Tensor | None,
        allowed: Tensor,
        width: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Return candidates, as `Sampler`."""
        choices = allowed.nonzero()[:, 0].expand(len(parent), -1)
        return _replace(parent, choices, width, self.replace, generator)


def make_sampler(config: SearchConfig) -> Sampler:
    """Return the sampler that the settings name."""
    if config.sampler == "random":
        return RandomSampler(config.replace)
    if config.sampler == "momentum":
        return MomentumSampler(config.topk, config.replace, config.momentum)
    return GradientSampler(config.topk, config.replace)


def allowed_tokens(tokenizer: object, size: int, *, non_ascii: bool) -> Tensor:
    """Return bool ``(V,)``: neither special nor, unless asked for, beyond printable ASCII."""
    from transformers import PreTrainedTokenizerBase

    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    allowed = torch.zeros(size, dtype=torch.bool)
    known = min(size, len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in range(known)])
    allowed[:known] = torch.tensor(
        [bool(text) and (non_ascii or (text.isascii() and text.isprintable())) for text in texts]
    )
    special = [token for token in tokenizer.all_special_ids if token < size]
    allowed[special] = False
    return allowed
