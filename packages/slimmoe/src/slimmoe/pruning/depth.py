"""Which layers are kept (arXiv:2605.08738, section 3.1 and appendix A.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def last(count: int, kept: int) -> list[int]:
    """Return the first layers.

    Args:
        count: Layers there are.
        kept: How many stay.
    """
    _check(count, kept)
    return list(range(kept))


def similar(means: Sequence[Tensor], kept: int) -> list[int]:
    """Return all but consecutive layers, from where a layer changes the mean output least.

    Args:
        means: Mean over tokens of the embeddings and of each layer's output, ``(D,)`` each.
        kept: How many of the layers stay.
    """
    count = len(means) - 1
    _check(count, kept)
    stacked = torch.stack([mean.double() for mean in means])
    alike = torch.cosine_similarity(stacked[:-1], stacked[1:], dim=-1)
    # no later than where as many layers follow
    first = int(alike[: kept + 1].argmax())
    return [*range(first), *range(first + count - kept, count)]


def without(count: int, dropped: Sequence[int]) -> list[int]:
    """Return all but some layers.

    Raises:
        ValueError: A number that no layer has, or none is left.
    """
    if beyond := [layer for layer in dropped if not 0 <= layer < count]:
        raise ValueError(message("drop_layers", f"numbers below {count}", beyond, "from 0 on"))
    kept = [layer for layer in range(count) if layer not in set(dropped)]
    _check(count, len(kept))
    return kept


def _check(count: int, kept: int) -> None:
    if not 1 <= kept <= count:
        raise ValueError(message("num_layers", f"1 to {count}", kept, "as the model has"))
