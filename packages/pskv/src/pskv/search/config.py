"""Settings of the searches; no torch is loaded here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared_kernels._checks import check_choice, check_range, message

SLOT = "{optim_str}"
"""Where the tokens that are searched for stand in the messages."""
SAMPLERS = ("gradient", "momentum", "random")
OBJECTIVES = ("nll", "mellowmax")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of `CoordinateSearch`.

    Attributes:
        steps: Steps at most.
        width: Candidates of a step, before the filter.
        topk: Tokens of each place, the most promising by gradient, that candidates are drawn from.
        replace: Places in which a candidate differs from its parent.
        buffer_size: Parents to keep; 0 goes on from the best candidate of each step, as published.
        init: Text to begin with; its length is the number of tokens.
        sampler: gradient (arXiv:2307.15043), momentum (arXiv:2405.01229) or random (no gradient).
        momentum: Share of the earlier gradients that the momentum sampler keeps.
        objective: nll (mean over the target's tokens) or mellowmax of the negated logits.
        mellowmax_alpha: Of mellowmax.
        filter: Drop candidates that change when the whole prompt is written down and read again.
        allow_non_ascii: Let tokens stand that are not printable ASCII.
        max_perplexity: Drop candidates that the model finds less likely than this, as a
            perplexity filter in front of it would.
        early_stop: Stop as soon as greedy decoding gives the target after some candidate.
        seed: Of all draws.
    """

    steps: int = 250
    width: int = 512
    topk: int = 256
    replace: int = 1
    buffer_size: int = 0
    init: str = "x x x x x x x x x x x x x x x x x x x x"
    sampler: Literal["gradient", "momentum", "random"] = "gradient"
    momentum: float = 0.4
    objective: Literal["nll", "mellowmax"] = "nll"
    mellowmax_alpha: float = 1.0
    filter: bool = True
    allow_non_ascii: bool = False
    max_perplexity: float | None = None
    early_stop: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "width", "topk", "replace"):
            check_range(name, getattr(self, name), 1, 2**31, "choose a larger one")
        check_range("buffer_size", self.buffer_size, 0, 2**31, "0 keeps no buffer")
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("objective", self.objective, OBJECTIVES)
        if not 0 <= self.momentum < 1:
            raise ValueError(message("momentum", "a number in [0, 1)", self.momentum, "try 0.4"))
        if self.mellowmax_alpha <= 0:
            remedy = "1 is usual"
            raise ValueError(
                message("mellowmax_alpha", "a positive number", self.mellowmax_alpha, remedy)
            )
        if self.max_perplexity is not None and self.max_perplexity < 1:
            remedy = "no text has less than 1; None drops nothing"
            raise ValueError(
                message("max_perplexity", "a number of at least 1", self.max_perplexity, remedy)
            )
        if not self.init:
            raise ValueError(message("init", "some text", self.init, 'for example "x x x x"'))


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """Settings of `BeamSearch` (arXiv:2402.15570).

    Attributes:
        length: Tokens to search for, one a step.
        beams: Beginnings that are kept, k1.
        expansions: Next tokens drawn for each of them from the model, k2.
        temperature: Of these draws.
        filter: As in `SearchConfig`; published without.
        max_perplexity: As in `SearchConfig`.
        early_stop: As in `SearchConfig`.
        seed: Of all draws.
    """

    length: int = 40
    beams: int = 15
    expansions: int = 15
    temperature: float = 1.0
    filter: bool = False
    max_perplexity: float | None = None
    early_stop: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "beams", "expansions"):
            check_range(name, getattr(self, name), 1, 2**31, "choose a larger one")
        if self.temperature <= 0:
            raise ValueError(
                message("temperature", "a positive number", self.temperature, "1 is usual")
            )
        if self.max_perplexity is not None and self.max_perplexity < 1:
            remedy = "no text has less than 1; None drops nothing"
            raise ValueError(
                message("max_perplexity", "a number of at least 1", self.max_perplexity, remedy)
            )
