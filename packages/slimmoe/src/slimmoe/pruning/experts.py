"""How important experts are, and which are kept (arXiv:2605.08738, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import check_choice, message

from slimmoe.configuration import IMPORTANCES

if TYPE_CHECKING:
    from torch import Tensor

    from slimmoe.calibration.statistics import ExpertStatistics


def importance(found: ExpertStatistics, name: str) -> Tensor:
    """Return how important each expert is, float64 ``(E,)``; 0 for one that is never selected.

    Args:
        found: Statistics of a layer.
        name: ``freq``, the share of tokens that it is selected for; ``soft``, the mean over tokens
            of its share of the weights of selected experts; ``reap``, the mean of weight times
            norm of its output over its tokens (REAP, arXiv:2510.13999), ``reap_total`` that over
            all tokens; ``norm_mean``, ``norm_total`` and ``norm_max`` of norms without weights.
    """
    check_choice("importance", name, IMPORTANCES)
    often = found.count.double().clamp(min=1)
    value = {
        "freq": found.count / found.tokens, "soft": found.share_sum / found.tokens,
        "reap": found.weighted_norm_sum / often,
        "reap_total": found.weighted_norm_sum / found.tokens,
        "norm_mean": found.norm_sum / often, "norm_total": found.norm_sum,
        "norm_max": found.norm_max,
    }[name].double()  # fmt: skip
    return torch.where(found.count > 0, value, 0.0)


def ranked(scores: Tensor) -> list[int]:
    """Return numbers by falling score; of equal scores the lower number comes first."""
    return scores.argsort(descending=True, stable=True).tolist()


def largest(scores: Tensor, count: int, groups: int = 1) -> list[int]:
    """Return the numbers of the largest scores, in rising order.

    Args:
        scores: ``(E,)``.
        count: How many.
        groups: Of as many neighbours each, from each of which as many are taken.

    Raises:
        ValueError: More than there are, or not as many from each group.
    """
    if not 1 <= count <= len(scores):
        remedy = "no more than there are"
        raise ValueError(message("kept", f"1 to {len(scores)}", count, remedy))
    if count % groups or len(scores) % groups:
        remedy = "groups of experts are of one size"
        raise ValueError(message("num_experts", f"a multiple of {groups}", count, remedy))
    size, each = len(scores) // groups, count // groups
    found: list[int] = []
    for group in range(groups):
        order = ranked(scores[group * size : (group + 1) * size])
        found += [group * size + place for place in order[:each]]
    return sorted(found)
