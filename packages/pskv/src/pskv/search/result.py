"""What a search found, and what it cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class SearchStep:
    """One step.

    Attributes:
        ids: The step's best candidate.
        loss: Its loss.
        best_loss: Smallest loss so far.
        best_nll: Smallest negative log-likelihood of the target so far, in nats, summed.
        evaluations: Candidates evaluated so far.
        dropped: Candidates that the filters dropped, of this step.
        seconds: Since the beginning.
    """

    ids: list[int]
    loss: float
    best_loss: float
    best_nll: float
    evaluations: int
    dropped: int
    seconds: float


@dataclass
class SearchResult:
    """A search.

    Attributes:
        ids: The best tokens.
        text: The same, decoded.
        loss: Their loss.
        elicited_at: Number of the first candidate after which greedy decoding gives the target,
            counting those that were evaluated; None if there was none.
        elicited_ids: That candidate.
        evaluations: Candidates evaluated.
        dropped: Candidates that the filters dropped.
        tokens: Tokens passed through the model.
        flops: Floating-point operations of these passes, as far as matrices are concerned.
        seconds: Wall time.
        steps: Each step.
        config: The settings.
    """

    ids: list[int]
    text: str
    loss: float
    elicited_at: int | None = None
    elicited_ids: list[int] | None = None
    evaluations: int = 0
    dropped: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    steps: list[SearchStep] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        """The loss of each step's best candidate."""
        return [step.loss for step in self.steps]

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        from shared_kernels.files import write_text

        write_text(path, json.dumps(self.to_dict(), indent=1))
