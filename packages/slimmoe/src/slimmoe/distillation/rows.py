"""Which row predicts what, and which of the teacher's rows says the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

IGNORED = -100
#: Name of a batch's numbers of sequences in a cache.
INDEX = "cache_index"


def labels_of(inputs: Mapping[str, Any]) -> Tensor:
    """Return what is to be predicted, ``(B, T)``; -100 where nothing is.

    Labels if there are any, else all tokens that are no padding.
    """
    if inputs.get("labels") is not None:
        return inputs["labels"]
    labels, mask = inputs["input_ids"], inputs.get("attention_mask")
    return labels if mask is None or mask.ndim != 2 else labels.masked_fill(mask == 0, IGNORED)


def documents(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the number of each token's document ``(B, T)``, 0 of padding; None if a row is one.

    Packed documents begin where positions begin anew.
    """
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    found = None if positions is None else (positions == 0).long().cumsum(-1)
    if mask is None or mask.ndim != 2:
        return found
    # what is behind padding does not follow from it
    real = (mask != 0).long()
    return real if found is None else found * real


def targets(labels: Tensor, document: Tensor | None, depth: int) -> tuple[Tensor, Tensor]:
    """Return what rows of a depth predict, and the teacher's rows that predict it.

    Row i of depth k predicts token ``i + k + 1``, as row ``i + k`` of a model does, whose depth is
    0. Nothing is predicted beyond the end of a document.

    Args:
        labels: ``(B, T)`` of `labels_of`.
        document: Of `documents`.
        depth: k.

    Returns:
        int64 ``(B (T - k),)`` each: labels, -100 where there is none; and rows of ``(B T,)``, -1
        where there is none.
    """
    batch, size = labels.shape
    ahead = labels.new_full((batch, size - depth), IGNORED)
    ahead[:, :-1] = labels[:, depth + 1 :]
    if document is not None:
        same = document[:, : size - depth - 1] == document[:, depth + 1 :]
        ahead[:, :-1].masked_fill_(~same, IGNORED)
    rows = torch.arange(batch * size, device=labels.device).view(batch, size)[:, depth:]
    return ahead.flatten(), rows.masked_fill(ahead == IGNORED, -1).flatten()
