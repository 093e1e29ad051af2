"""The linear datamodelling score (arXiv:2303.14186): sums of scores against training again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._checks import check_range, message
from torch import Tensor

from sam_if.evaluate.agreement import Agreement, values_of
from sam_if.evaluate.retrainings import Retrainings

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from sam_if.scores import Scores


@dataclass(frozen=True, eq=False)
class LDSResult:
    """How well sums of scores foretell what removing random subsets does.

    Attributes:
        agreements: By fraction of the data that was removed: predicted and true effects of its
            subsets. Without a baseline the true ones are what was measured itself, whose
            correlations are the same.
        subsets: By fraction, the samples that were removed.
    """

    agreements: dict[float, Agreement]
    subsets: dict[float, list[tuple[int, ...]]]

    @property
    def spearman(self) -> Tensor:
        """The score: mean over queries, of each fraction, ``(F,)``."""
        return self._means("spearman")

    @property
    def pearson(self) -> Tensor:
        """The same with Pearson's correlation, ``(F,)``."""
        return self._means("pearson")

    @property
    def ci(self) -> Tensor:
        """Intervals of 95 % of ``spearman``, ``(F, 2)``; see `Agreement.interval` for others."""
        found = [agreement.interval() for agreement in self.agreements.values()]
        return torch.tensor(found, dtype=torch.float64)

    def _means(self, kind: str) -> Tensor:
        found = [agreement.mean(kind) for agreement in self.agreements.values()]
        return torch.tensor(found, dtype=torch.float64)


def lds(
    retrain: Callable[[Any], Any],
    scores: Scores | Tensor,
    fractions: Sequence[float] = (0.01, 0.05),
    subsets: int = 50,
    seed: int = 0,
    *,
    baseline: bool = False,
    together: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> LDSResult:
    """Train again without random subsets, and compare with the sums of their scores.

    Trainings must differ in the samples alone: see `loo`. Do not choose options of scores, such as
    damping, by the subsets that are reported: take another seed.

    Args:
        retrain: As in `loo`.
        scores: ``(Q, n)``: by how much each query would rise.
        fractions: Of the data, to remove.
        subsets: How many of each fraction; more of them begin with the same ones.
        seed: Of their draws.
        baseline: Train with all data, too, for true effects instead of what is measured.
        together: As many as ``retrain`` takes at a time; see `retrain_together`.
        path: A JSON file where trainings are kept, and gone on from, also with other scores.
        progress: Show a bar.

    Raises:
        ValueError: A fraction that leaves nothing or removes nothing, less than three subsets, a
            file of another question, or trainings that do not return finite numbers of this shape.
    """
    values = values_of(scores)
    check_range("subsets", subsets, 3, 1 << 31, "a correlation needs some")
    count, drawn = values.shape[1], {}
    for fraction in fractions:
        size = round(float(fraction) * count)
        if not 0 < size < count:
            remedy = f"of {count} samples"
            raise ValueError(message("fractions", "parts of the data", fraction, remedy))
        draws = np.random.default_rng([seed, size])
        drawn[float(fraction)] = [
            tuple(sorted(draws.choice(count, size, replace=False).tolist())) for _ in range(subsets)
        ]
    shape = (values.shape[0], count)
    farm = Retrainings(retrain, shape, together=together, path=path, progress=progress)
    every = [chosen for part in drawn.values() for chosen in part]
    measured = farm.of([(), *every] if baseline else every)
    if baseline:
        measured = measured[1:] - measured[0]
    parts = dict(zip(drawn, measured.split(subsets), strict=True))
    agreements = {
        fraction: Agreement(
            torch.stack([values[:, list(chosen)].sum(1) for chosen in drawn[fraction]], 1), part.T
        )
        for fraction, part in parts.items()
    }
    return LDSResult(agreements, drawn)
