"""How alike experts are (arXiv:2605.08738, section 3.2 and table 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from slimmoe.calibration.statistics import ExpertStatistics


def cosines(rows: Tensor) -> Tensor:
    """Return cosines of rows, ``(E, E)`` of ``(E, D)``; 0 where a row is 0."""
    return of_gram(rows.double() @ rows.double().T)


def of_gram(gram: Tensor) -> Tensor:
    """Return cosines of vectors from their products, ``(E, E)``; 0 where one is 0."""
    sizes = gram.double().diagonal().clamp(min=0).sqrt()
    scale = torch.where(sizes > 0, 1 / sizes, 0.0)
    return gram.double() * scale[:, None] * scale[None]


def gram_of(parts: Iterable[Tensor]) -> Tensor:
    """Return products of experts' weights, ``(E, E)``, without all of them in one matrix.

    Args:
        parts: ``(E, ...)`` each, together all weights.
    """
    gram = None
    for part in parts:
        rows = part.flatten(1).float()
        found = (rows @ rows.T).double()
        gram = found if gram is None else gram + found
    if gram is None:
        raise ValueError("expected weights of experts, got none")
    return gram


def similarity(
    name: str,
    found: ExpertStatistics | None,
    router: Callable[[], Tensor],
    weights: Callable[[], Iterable[Tensor]],
) -> Tensor:
    """Return how alike experts are, float64 ``(E, E)``.

    Args:
        name: One of `slimmoe.configuration.SIMILARITIES`.
        found: Statistics of the layer.
        router: Gives the matrix ``(E, D)`` whose rows the layer selects by.
        weights: Gives the experts' weights in parts ``(E, ...)``.
    """
    if name == "router_weight":
        return cosines(router())
    if name == "expert_weight":
        return of_gram(gram_of(weights()))
    assert found is not None
    # a cosine of sums is that of means
    return of_gram(found.logit_gram) if name == "router_logit" else cosines(found.output_sum)
