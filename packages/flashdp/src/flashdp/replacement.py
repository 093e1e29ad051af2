"""A batch with other data for some of its rows, as valid as its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["other_values", "replaced"]

# What says where or whether something is, rather than what: replaced, it might be invalid.
_KEPT = ("mask", "position", "cache", "token_type", "seq_len", "lengths", "dp_")


def replaced(batch: Any, other: Any, rows: Tensor, *, packed: bool = False) -> Any:
    """Take the given rows, bool (rows,), of every tensor that has them from another batch.

    Args:
        batch: A pytree of tensors and other things.
        other: The same with other values.
        rows: Which to take from the other.
        packed: Whether rows are the tokens of (1, tokens, ...).
    """
    dim = int(packed)
    leaves, spec = pytree.tree_flatten_with_path(batch)
    theirs, their_spec = pytree.tree_flatten(other)
    if spec != their_spec:
        raise ValueError("the other batch is made of other parts than the batch")
    found = []
    for (path, mine), its in zip(leaves, theirs, strict=True):
        batched = (
            isinstance(mine, torch.Tensor)
            and mine.ndim > dim
            and mine.shape[: dim + 1].numel() == len(rows)
        )
        if not batched or its is mine or _name(path).startswith("dp_"):
            found.append(mine)
            continue
        if its.shape != mine.shape:
            raise ValueError(
                f"the other batch has {_name(path) or 'a tensor'} of shape {tuple(its.shape)}, the "
                f"batch {tuple(mine.shape)}"
            )
        where = rows.to(mine.device).view(*(1,) * dim, -1, *(1,) * (mine.ndim - 1 - dim))
        mixed = torch.where(where, its.detach().to(mine), mine.detach())
        found.append(mixed.requires_grad_(mine.requires_grad))
    return pytree.tree_unflatten(found, spec)


def other_values(
    batch: Any, *, from_row_before: bool, has_config: bool, packed: bool = False
) -> Any:
    """Other valid values of the same shapes: those of a row, of the batch's, turned around.

    Args:
        batch: A pytree of tensors and other things.
        from_row_before: Take them from the row before, and not from the same.
        has_config: Whether it is for a model of transformers.
        packed: Whether rows are the tokens of (1, tokens, ...).
    """

    def other(path: tuple, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.ndim or x.dtype == torch.bool:
            return x
        name, whole = _name(path), not (x.is_floating_point() or x.is_complex())
        if any(word in name for word in _KEPT):
            return x
        if whole and x.ndim > 1 and ((has_config and name == "labels") or bool((x == -100).any())):
            # Fewer labels: a mean over the batch's labels divides by another number then.
            valid = (x != -100).flatten(1)
            last = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
            return x.masked_fill(~last.view_as(x), -100)
        x = x.detach()
        if from_row_before or x.ndim == 1:
            x = x.roll(1, int(packed and x.ndim > 1))
        if x.ndim > 1:
            x = x.flip(-1)
        return x if whole else x * 0.5

    return pytree.tree_map_with_path(other, batch)


def _name(path: tuple) -> str:
    return str(getattr(path[-1], "key", "") if path else "").lower()
