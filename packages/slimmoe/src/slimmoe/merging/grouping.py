"""Which experts are averaged, with what weights (arXiv:2605.08738, algorithm 1)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from slimmoe.pruning.experts import largest

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experts:
    """The experts of a layer that come out.

    Attributes:
        kept: Numbers of those that they are made of first, in rising order: their rows of the
            router stay.
        members: Of each, the experts that are averaged, itself first.
        weights: Of members; they add up to 1.
    """

    kept: list[int]
    members: list[list[int]]
    weights: list[list[float]]

    @property
    def merged(self) -> bool:
        """Whether any is an average."""
        return any(len(group) > 1 for group in self.members)

    @staticmethod
    def alone(kept: list[int]) -> Experts:
        """Return experts that stay as they are."""
        return Experts(kept, [[expert] for expert in kept], [[1.0]] * len(kept))


def grouped(
    scores: Tensor,
    alike: Tensor | None,
    count: int,
    preserve: float,
    groups: int = 1,
    name: str = "experts",
) -> Experts:
    """Return what comes out of a layer's experts.

    The most important ones stay as they are, the next are bases, and every other expert goes to the
    base that is most like it. A base is then the average of its group, weighted by importance.

    Args:
        scores: Importance ``(E,)``.
        alike: ``(E, E)``; None if none are merged.
        count: How many come out.
        preserve: Share of them that stay as they are; the rest are bases.
        groups: Groups of experts that the router selects from first: experts stay in theirs.
        name: Of the layer, for warnings.
    """  # fmt: skip
    kept = largest(scores, count, groups)
    size, each = len(scores) // groups, count // groups
    preserved = math.floor(each * preserve)
    if alike is None or preserved == each:
        return Experts.alone(kept)
    members = {expert: [expert] for expert in kept}
    for group in range(groups):
        inside = [expert for expert in kept if group * size <= expert < (group + 1) * size]
        # stable, so that of equals the lower numbers are preserved
        order = sorted(inside, key=lambda expert: -float(scores[expert]))
        bases = sorted(order[preserved:])
        for expert in range(group * size, (group + 1) * size):
            if expert not in members:
                place = int(alike[expert, bases].argmax())
                members[bases[place]].append(expert)
    weights = []
    for group in members.values():
        found = scores[group].double()
        total = float(found.sum())
        if not math.isfinite(total) or total <= 0:
            if len(group) > 1:
                _LOG.warning("%s: experts %s were never selected: averaged alike", name, group)
            found, total = torch.ones(len(group), dtype=torch.float64), float(len(group))
        weights.append((found / total).tolist())
    return Experts(kept, list(members.values()), weights)
