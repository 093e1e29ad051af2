"""Rows that a predictor is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forelen.configuration_forelen import LengthPredictorConfig
    from forelen.store import Collected


class LengthDataset(Dataset):
    """Answers before they begin and, with ``plp``, at the steps that were kept.

    An answer's steps together weigh as much as its beginning, as in ``(1/T) sum_t L(R_t, R^_t)``.

    Args:
        found: Prompts and answers.
        config: Of the predictor.
        initial: Have a row for each answer before it begins.
        steps: Have rows for its steps; by default those of ``plp``.

    Raises:
        ValueError: The vector that the predictor takes was not collected, or of another model.
    """

    def __init__(
        self,
        found: Collected,
        config: LengthPredictorConfig,
        *,
        initial: bool = True,
        steps: bool | None = None,
    ) -> None:
        key = config.feature_spec().key
        if key not in found.prompts:
            remedy = "collect it, or train on one of these"
            raise ValueError(message("features", f"one of {list(found.prompts)}", key, remedy))
        trained, seen = config.fingerprint, found.header["model"]
        if trained and trained != seen:
            raise ValueError(
                message("found", f"answers of {trained}", seen, "collect answers of that model")
            )
        siblings = found.lengths.shape[1]
        lengths, censored = found.lengths.flatten(), found.censored.flatten()
        self.features = found.prompts[key].float()
        with_steps = config.plp if steps is None else steps
        none = torch.empty(0, dtype=torch.int64)
        start = torch.arange(len(lengths)) if initial else none
        self.sample = torch.cat([start, found.step_sample if with_steps else none])
        self.time = torch.cat([torch.zeros_like(start), found.step_time if with_steps else none])
        self.labels = lengths[self.sample] - self.time
        self.censored = censored[self.sample]
        self.group = self.sample // max(1, siblings)
        self.weights = torch.ones(len(self.sample))
        later = self.time > 0
        counts = torch.bincount(self.sample[later], minlength=len(lengths)).clamp(min=1)
        self.weights[later] = 1 / counts[self.sample[later]].float()
        # a stopped answer goes on after its last token: nothing is said of none
        keep = (self.labels >= 1).nonzero()[:, 0]
        self.steps = found.steps if with_steps else None
        self.step = torch.cat(
            [torch.full_like(start, -1), torch.arange(len(self.sample) - len(start))]
        )
        for name in ("sample", "time", "labels", "censored", "group", "weights", "step"):
            setattr(self, name, getattr(self, name)[keep])

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row, its tensors without a first dimension."""
        return {name: value[0] for name, value in self.batch([index]).items()}

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return rows as a loader asks for them; `collate` knows that they are one batch."""
        return [self.batch(rows)]

    def batch(self, rows: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Return rows as the arguments of a predictor."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        group = self.group[rows]
        found = {
            "prompt_features": self.features[group],
            "labels": self.labels[rows],
            "censored": self.censored[rows],
            "weights": self.weights[rows],
            "group_ids": group,
            "times": self.time[rows],
        }
        if self.steps is not None:
            step = self.step[rows]
            features = self.steps[step.clamp(min=0)].float()
            found["decode_features"] = torch.where(step[:, None] >= 0, features, 0.0)
        return found


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make a batch: of rows, or of the one batch that a `LengthDataset` returns."""
    first = rows[0]
    if len(rows) == 1 and first["labels"].dim():
        return first
    return {name: torch.stack([row[name] for row in rows]) for name in first}
